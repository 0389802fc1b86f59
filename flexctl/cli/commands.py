"""The commands: their flags, what they say they do, and an example of each. What they do is in engine/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

from flexctl.cli import options as o
from flexctl.cli.help import HelpPage
from flexctl.cli.output import print_version

__all__ = ["Call", "app"]

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)
_Flags = TypeVar("_Flags", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What the command line asks for.

    Attributes:
        command: The command's name with underscores.
        given: Field of its Config -> value as given; None where it was not.
        json: One JSON object instead of text.
        quiet: No progress, notes or warnings.
        verbose: Every figure of the result.
    """

    command: str
    given: dict[str, Any]
    json: bool
    quiet: bool
    verbose: bool


def _command(*examples: str, name: str | None = None) -> Callable[[_Flags], _Flags]:
    """Register a command whose name is its function's unless given, with lines that its help page shows."""
    return app.command(name, cls=HelpPage, epilog="\n".join(examples))


def _call(command: str, parameters: dict[str, Any]) -> Call:
    manner = {name: bool(parameters.pop(name)) for name in ("json", "quiet", "verbose")}
    return Call(command=command, given=parameters, **manner)


def _print_version(asked: bool) -> None:
    if asked:
        print_version()
        raise typer.Exit


@app.callback()
def _flexctl(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train experts on text that may not be shared, merge them into one model, remove them again exactly.

    A coordinator publishes an anchor, every owner trains an expert at home, anyone merges them.
    Start with: flexctl demo
    """


@_command(
    "flexctl init-anchor --data public.jsonl --preset micro",
    "flexctl init-anchor allenai/OLMo-2-0425-1B --data public.jsonl",
)
def init_anchor(
    source: o.Source = None,
    data: o.Data = None,
    text_field: o.TextField = None,
    output: o.Output = None,
    name: o.Name = None,
    preset: o.Preset = None,
    max_tokens: o.MaxTokens = None,
    anneal_tokens: o.AnnealTokens = None,
    sample_tokens: o.SampleTokens = None,
    seq_len: o.SeqLen = None,
    batch_tokens: o.BatchTokens = None,
    lr: o.Lr = None,
    license: o.License = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    resume: o.Resume = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Make the public, frozen model that experts train against.

    SOURCE is a stock checkpoint. Without it, a tokenizer and a small model of OLMo-2's shape are
    trained on --data. --data is public text; it also calibrates the routers, and a sample of it goes
    along with the anchor, for owners to mix into their training. Writes flexctl.toml where there is none.
    """
    return _call("init_anchor", locals())


@_command(
    "flexctl train-expert --data law/",
    "flexctl train-expert --data law.jsonl --name law --max-tokens 2000000 --license CC-BY-4.0",
)
def train_expert(
    data: o.Data = None,
    text_field: o.TextField = None,
    anchor: o.Anchor = None,
    name: o.Name = None,
    output: o.Output = None,
    router: o.Router = None,
    encoder: o.Encoder = None,
    rank: o.Rank = None,
    max_tokens: o.MaxTokens = None,
    max_steps: o.MaxSteps = None,
    epochs: o.Epochs = None,
    lr: o.Lr = None,
    warmup_steps: o.WarmupSteps = None,
    seq_len: o.SeqLen = None,
    batch_tokens: o.BatchTokens = None,
    micro_batch: o.MicroBatch = None,
    public_mix: o.PublicMix = None,
    public_match: o.PublicMatch = None,
    public: o.Public = None,
    freeze_router: o.FreezeRouter = None,
    tether: o.Tether = None,
    resume: o.Resume = None,
    checkpoint_steps: o.CheckpointSteps = None,
    license: o.License = None,
    purpose: o.Purpose = None,
    expires: o.Expires = None,
    label: o.Label = None,
    contact: o.Contact = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Train one expert on text that stays where it is.

    Trains against the frozen anchor and writes one file, experts/NAME.st: what you share. Only
    feed-forward weights and router rows are trained; everything else is checked afterwards to be the
    anchor's, bit for bit.
    """
    return _call("train_expert", locals())


@_command(
    "flexctl import-expert OLMo-2-1B-law --data law/",
    "flexctl import-expert acme/OLMo-2-1B-law --name law --data law.jsonl --ffn-only",
)
def import_expert(
    dense: o.Dense,
    data: o.Data = None,
    text_field: o.TextField = None,
    anchor: o.Anchor = None,
    name: o.Name = None,
    output: o.Output = None,
    ffn_only: o.FfnOnly = None,
    router: o.Router = None,
    encoder: o.Encoder = None,
    license: o.License = None,
    purpose: o.Purpose = None,
    expires: o.Expires = None,
    label: o.Label = None,
    contact: o.Contact = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Make an expert of a checkpoint fine-tuned elsewhere.

    DENSE_DIR must have been fine-tuned from the anchor, and in its feed-forward weights alone. Where others
    moved too it is refused; --ffn-only leaves those behind, and the losses shown say what that costs.
    Router rows come from --data. Weights are copied as bytes; with --router FILE.st no model is built at
    all, so that memory stays flat however large the checkpoint is.
    """
    return _call("import_expert", locals())


@_command(
    "flexctl embed-router --data law/ -o law-rows.st",
    "flexctl embed-router --data law/ --expert experts/law.st -o law-2.st",
)
def embed_router(
    data: o.Data = None,
    text_field: o.TextField = None,
    anchor: o.Anchor = None,
    router: o.RouterKind = None,
    encoder: o.Encoder = None,
    expert: o.Expert = None,
    output: o.OutputFile = None,
    compare: o.Compare = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Make router rows from sample texts, without training.

    With -o they go to a file for train-expert --router; with --expert, into a copy of that expert.
    Warns where the text cannot be told from public text, or where the noise of the rows is large.
    """
    return _call("embed_router", locals())


@_command(
    "flexctl compress experts/law.st --data heldout/law",
    "flexctl compress experts/law.st --data heldout/law --rank 16 -o law-small.st",
)
def compress(
    expert: o.FullExpert,
    data: o.Data = None,
    text_field: o.TextField = None,
    rank: o.CompressRank = None,
    size: o.Size = None,
    anchor: o.Anchor = None,
    output: o.OutputBeside = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Make a small, low-rank copy of an expert.

    Cuts its difference to the public expert to a rank that is given, or to ranks that are chosen matrix
    by matrix on --data within a size. The copy keeps name and rights and merges as the expert does.
    """
    return _call("compress", locals())


@_command(
    "flexctl merge experts/*.st",
    "flexctl merge merged experts/news.st -o merged-2",
)
def merge(
    experts: o.Experts = None,
    anchor: o.Anchor = None,
    output: o.Output = None,
    top_k: o.TopK = None,
    allow_expired: o.AllowExpired = None,
    trust_cache: o.TrustCache = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Merge the anchor and experts into one stock checkpoint.

    No training: bytes are copied and checked against each owner's manifest. The same set gives the same
    bytes in whatever order. A merged model as first argument is added to; no expert at all gives the
    anchor alone.
    """
    return _call("merge", locals())


@_command(
    "flexctl remove law",
    "flexctl remove law news --from merged -o without-law-and-news",
)
def remove(
    names: o.Names,
    source: o.From = None,
    output: o.OutputElsewhere = None,
    tombstone: o.Tombstone = None,
    trust_cache: o.TrustCache = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Remove experts exactly, as if they had never been merged.

    Works on the workspace's merged model, which is replaced in one step. With -o the result goes elsewhere.
    """
    return _call("remove", locals())


@_command(
    "flexctl replace law law-2.st",
    "flexctl replace law law-2.st --data law=heldout/law --data news=heldout/news",
)
def replace(
    name: o.OneName,
    expert: o.OneExpert,
    source: o.From = None,
    output: o.OutputElsewhere = None,
    data: o.DataSets = None,
    text_field: o.TextField = None,
    seq_len: o.SeqLen = None,
    batch_tokens: o.ScoredTokens = None,
    threads: o.Threads = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    allow_expired: o.AllowExpired = None,
    trust_cache: o.TrustCache = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Replace one expert by its new version; say what changed.

    With --data also how each domain's bits per byte changed, scored as evaluate does.
    """
    return _call("replace", locals())


@_command(
    "flexctl select-proxy --data law/",
    "flexctl select-proxy --data law.jsonl --public crawl/ --count 5000 -o law.proxy.json",
)
def select_proxy(
    data: o.Data = None,
    text_field: o.TextField = None,
    anchor: o.Anchor = None,
    name: o.Name = None,
    output: o.OutputProxy = None,
    public: o.PublicToChoose = None,
    count: o.Count = None,
    encoder: o.SelectEncoder = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Choose, at home, the public documents most like your text.

    Writes a list of their numbers and hashes: what you give to a coordinator for tune-router in place of
    any text. It says which public documents your text resembles, and nothing else.
    """
    return _call("select_proxy", locals())


@_command(
    "flexctl tune-router --proxy law.proxy.json --proxy news.proxy.json",
    "flexctl tune-router merged --proxy law.proxy.json --public crawl/ -o merged-tuned",
)
def tune_router(
    merged: o.MergedModel = None,
    proxy: o.Proxy = None,
    text_field: o.TextField = None,
    anchor: o.Anchor = None,
    public: o.PublicOfLists = None,
    output: o.OutputElsewhere = None,
    max_tokens: o.TuneTokens = None,
    max_steps: o.MaxSteps = None,
    lr: o.Lr = None,
    seq_len: o.SeqLen = None,
    batch_tokens: o.BatchTokens = None,
    tether: o.Tether = None,
    resume: o.Resume = None,
    checkpoint_steps: o.CheckpointSteps = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Tune the router of a merged model on public text.

    Trains the router rows, and nothing else, on the public documents that each owner chose. The owners'
    rows stay in the model; merge, remove and replace go back to them. Rows that are no better on held-out
    text are not written.
    """
    return _call("tune_router", locals())


@_command(
    "flexctl evaluate --data law=heldout/law --data news=heldout/news",
    "flexctl evaluate --data law=heldout/law --without law --json",
    "flexctl evaluate --data law=heldout/law --data public=heldout/public --report report.html",
    "flexctl evaluate --data law=heldout/law --ablate --sweep-top-k --samples law.jsonl",
    "flexctl evaluate merged-2 --compare merged --data law=heldout/law",
    "flexctl evaluate --data law=heldout/law --baselines dense",
    "flexctl evaluate --tasks arc_easy.jsonl --tasks my-tasks/ --limit 100 --without law",
)
def evaluate(
    bundle: o.Bundle = None,
    data: o.DataSets = None,
    text_field: o.TextField = None,
    tasks: o.Tasks = None,
    shots: o.Shots = None,
    limit: o.Limit = None,
    without: o.Without = None,
    ablate: o.Ablate = None,
    sweep_top_k: o.SweepTopK = None,
    compare: o.CompareWith = None,
    samples: o.Samples = None,
    report: o.Report = None,
    anchor: o.Anchor = None,
    top_k: o.TopK = None,
    baselines: o.Baselines = None,
    seq_len: o.SeqLen = None,
    batch_tokens: o.ScoredTokens = None,
    threads: o.Threads = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    overwrite: o.Overwrite = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Score a bundle on held-out text and on tasks.

    Perplexity and bits per byte with a 95 % interval, and the share of each expert in the answers. The figures
    also go to results.json beside the bundle, which push sends along, unless --without or --top-k makes it
    another model. What was scored before comes from a cache: a run that is repeated, extended or was
    interrupted scores only what is new.

    The page of --report holds every figure, those of --ablate and --sweep-top-k included: with n closed
    experts some 2n + 1 more passes over the texts. It also holds the first 120 tokens or so of each text.
    """
    return _call("evaluate", locals())


@_command(
    'flexctl generate --prompt "The court held that" --explain',
    'flexctl generate --prompt "The court held that" --without law',
)
def generate(
    bundle: o.Bundle = None,
    prompt: o.Prompt = None,
    without: o.Without = None,
    explain: o.Explain = None,
    chat: o.Chat = None,
    anchor: o.Anchor = None,
    max_new_tokens: o.MaxNewTokens = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    seed: o.Seed = None,
    threads: o.Threads = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Continue a text, and show on request which expert answered."""
    return _call("generate", locals())


@_command(
    "flexctl inspect experts/law.st",
    "flexctl inspect hf://acme/law-expert",
)
def inspect(
    path: o.BundleAnywhere,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Show what a bundle says about itself.

    Sizes, experts, licenses and how it was trained. Nothing is hashed: see verify.
    """
    return _call("inspect", locals())


@_command(
    "flexctl verify merged",
    "flexctl verify merged --absent law",
    "flexctl verify hf://acme/merged",
)
def verify(
    path: o.BundleAnywhere,
    absent: o.Absent = None,
    anchor: o.Anchor = None,
    allow_expired: o.AllowExpired = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Re-hash and check everything in a bundle. Exit code 3 when something does not hold."""
    return _call("verify", locals())


@_command(
    "flexctl list",
    name="list",
)
def list_(
    path: o.Folder = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """List the workspace's anchor, experts and merged model."""
    return _call("list", locals())


@_command(
    "flexctl push experts/law.st acme/law-expert --base-model acme/anchor",
    "flexctl push merged acme/merged --private --dry-run",
)
def push(
    path: o.BundlePath,
    repository: o.Repository,
    private: o.Private = None,
    revision: o.Branch = None,
    message: o.Message = None,
    base_model: o.BaseModel = None,
    allow_expired: o.AllowExpired = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Publish a bundle on the Hugging Face Hub.

    Verifies all of it first, then sends it in one commit, with a model card. The repository is made if it
    is not there; it then holds this bundle and nothing else. The token is HF_TOKEN's, or hf auth login's.
    """
    return _call("push", locals())


@_command(
    "flexctl pull acme/anchor",
    "flexctl pull acme/merged --revision v2 -o merged-v2",
)
def pull(
    repository: o.Repository,
    revision: o.Revision = None,
    output: o.Output = None,
    allow_expired: o.AllowExpired = None,
    overwrite: o.Overwrite = None,
    dry_run: o.DryRun = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Bring a bundle from the Hugging Face Hub.

    Verifies all of it before it is moved into place. Files that are no part of a bundle are refused. An
    interrupted pull goes on where it broke off.
    """
    return _call("pull", locals())


@_command(
    "flexctl demo",
)
def demo(
    output: o.OutputFolder = None,
    threads: o.Threads = None,
    overwrite: o.Overwrite = None,
    json: o.Json = None,
    quiet: o.Quiet = None,
    verbose: o.Verbose = None,
) -> Call:
    """Show an expert's whole life, offline, in a few minutes.

    Makes an anchor and experts from text that is on this machine, merges them, scores them, removes one
    and proves that it is gone. Everything is left in the directory to look around.
    """
    return _call("demo", locals())
