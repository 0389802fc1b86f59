# Written by `make docs`; a test checks that it is current.

from flexctl.routing.noised_rows import private_rows as private_rows
from flexctl.routing.noised_rows import shift_norm as shift_norm
from flexctl.routing.proxies import PASSAGES_A_FOLD as PASSAGES_A_FOLD
from flexctl.routing.proxies import Ranking as Ranking
from flexctl.routing.proxies import listed_documents as listed_documents
from flexctl.routing.proxies import public_reader as public_reader
from flexctl.routing.proxies import rank_public as rank_public
from flexctl.routing.rows import Rows as Rows
from flexctl.routing.rows import row_logits as row_logits
from flexctl.routing.space import InputStatistics as InputStatistics
from flexctl.routing.space import RouterSpace as RouterSpace
from flexctl.routing.space import constant_spread as constant_spread
from flexctl.routing.space import fit_space as fit_space
from flexctl.routing.space import measure_documents as measure_documents
from flexctl.routing.space import measure_inputs as measure_inputs
from flexctl.routing.space import measure_passages as measure_passages
from flexctl.routing.start_rows import PASSAGES as PASSAGES
from flexctl.routing.start_rows import Encoder as Encoder
from flexctl.routing.start_rows import RowRecipe as RowRecipe
from flexctl.routing.start_rows import embed_rows as embed_rows
from flexctl.routing.start_rows import encoder_name as encoder_name
