# Written by `make docs`; a test checks that it is current.

from flexctl.serving.app import make_app as make_app
from flexctl.serving.asking import Service as Service
from flexctl.serving.batching import Batcher as Batcher
from flexctl.serving.hosts import LOCAL_NAMES as LOCAL_NAMES
from flexctl.serving.jobs import Ask as Ask
from flexctl.serving.jobs import Busy as Busy
from flexctl.serving.jobs import Done as Done
from flexctl.serving.jobs import Event as Event
from flexctl.serving.jobs import Failed as Failed
from flexctl.serving.jobs import Job as Job
from flexctl.serving.jobs import Prompt as Prompt
from flexctl.serving.jobs import Token as Token
from flexctl.serving.listening import bind as bind
from flexctl.serving.listening import listener as listener
from flexctl.serving.metrics import Metrics as Metrics
from flexctl.serving.permits import Permits as Permits
from flexctl.serving.permits import read_keys as read_keys
from flexctl.serving.replies import Account as Account
from flexctl.serving.requirements import require_server as require_server
from flexctl.serving.sampling import Sampling as Sampling
from flexctl.serving.stopping import Stops as Stops
