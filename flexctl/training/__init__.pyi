# Written by `make docs`; a test checks that it is current.

from flexctl.training.batches import EqualShares as EqualShares
from flexctl.training.batches import Mixture as Mixture
from flexctl.training.budget import Budget as Budget
from flexctl.training.budget import default_lr as default_lr
from flexctl.training.budget import held_out_tokens as held_out_tokens
from flexctl.training.budget import passages as passages
from flexctl.training.budget import resolve_budget as resolve_budget
from flexctl.training.budget import warmup_steps as warmup_steps
from flexctl.training.checkpoints import Checkpoints as Checkpoints
from flexctl.training.finished import asked_for as asked_for
from flexctl.training.finished import before_after as before_after
from flexctl.training.finished import folder_digest as folder_digest
from flexctl.training.finished import refuse_other_request as refuse_other_request
from flexctl.training.finished import say_done as say_done
from flexctl.training.loop import LoopSettings as LoopSettings
from flexctl.training.loop import Outcome as Outcome
from flexctl.training.loop import train as train
from flexctl.training.pair import Pair as Pair
from flexctl.training.ranks import Factors as Factors
from flexctl.training.ranks import choose_ranks as choose_ranks
from flexctl.training.ranks import expert_matrices as expert_matrices
from flexctl.training.tuning import RouterTuning as RouterTuning
from flexctl.training.whole import WholeSettings as WholeSettings
from flexctl.training.whole import train_whole as train_whole
from flexctl.training.work import refuse_busy as refuse_busy
from flexctl.training.work import working_folder as working_folder
