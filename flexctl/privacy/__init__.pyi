# Written by `make docs`; a test checks that it is current.

from flexctl.privacy.accounting import ACCOUNTANT as ACCOUNTANT
from flexctl.privacy.accounting import ADJACENCY as ADJACENCY
from flexctl.privacy.accounting import MECHANISM as MECHANISM
from flexctl.privacy.accounting import UNIT as UNIT
from flexctl.privacy.accounting import Mechanism as Mechanism
from flexctl.privacy.accounting import gaussian_noise as gaussian_noise
from flexctl.privacy.accounting import is_installed as is_installed
from flexctl.privacy.accounting import least_noise as least_noise
from flexctl.privacy.accounting import refutation as refutation
from flexctl.privacy.accounting import spent as spent
from flexctl.privacy.clipping import PerDocument as PerDocument
from flexctl.privacy.documents import Documents as Documents
from flexctl.privacy.documents import Padded as Padded
from flexctl.privacy.documents import padded as padded
from flexctl.privacy.ledger import Ledger as Ledger
from flexctl.privacy.ledger import open_ledger as open_ledger
from flexctl.privacy.noise import Secret as Secret
from flexctl.privacy.noise import Stream as Stream
from flexctl.privacy.noise import noisy as noisy
