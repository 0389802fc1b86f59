# Written by `make docs`; a test checks that it is current.

from flexctl.evaluation.domains import Domain as Domain
from flexctl.evaluation.domains import parse_domains as parse_domains
from flexctl.evaluation.domains import score_domain as score_domain
from flexctl.evaluation.domains import window_length as window_length
from flexctl.evaluation.scoring import held_out_losses as held_out_losses
from flexctl.evaluation.scoring import score_documents as score_documents
