# Written by `make docs`; a test checks that it is current.

from flexctl.serving.batching import Batcher as Batcher
from flexctl.serving.jobs import Ask as Ask
from flexctl.serving.jobs import Busy as Busy
from flexctl.serving.jobs import Done as Done
from flexctl.serving.jobs import Event as Event
from flexctl.serving.jobs import Failed as Failed
from flexctl.serving.jobs import Job as Job
from flexctl.serving.jobs import Prompt as Prompt
from flexctl.serving.jobs import Token as Token
from flexctl.serving.sampling import Sampling as Sampling
from flexctl.serving.stopping import Stops as Stops
