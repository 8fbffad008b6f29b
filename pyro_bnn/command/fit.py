"""`pyro-bnn fit`: trains a Bayesian network and its deterministic twin."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

import pyro_bnn as pb
from pyro_bnn.command import runs
from pyro_bnn.command.options import (
    FamilyName,
    GroupName,
    MethodName,
    NetworkName,
    Options,
    PriorName,
    SamplingName,
    UpdateName,
    check,
    complete,
)
from pyro_bnn.command.recipes import Trained, find_device, new_network, train_and_score
from pyro_bnn.command.terminal import (
    DEFAULT_DATA,
    BatchSize,
    CategoryColumns,
    DataOptions,
    DropColumns,
    Impute,
    SplitRows,
    TargetColumn,
    TaskOption,
    notes_of,
    require_folder,
    require_free,
    table_of_metrics,
    user_errors,
)
from pyro_bnn.command.unfinished import Unfinished
from pyro_bnn.data import IMAGE_SIZE, Task
from pyro_bnn.distributed import processes
from pyro_bnn.models.architectures.pretrained import find_weights, image_size


def fit(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="digits, digits-100 for so many training images, or a path: .npz, .csv (with --target) or a folder "
            "of images"
        ),
    ] = DEFAULT_DATA,
    target: TargetColumn = None,
    task_: TaskOption = None,
    drop: DropColumns = None,
    split: SplitRows = None,
    category: CategoryColumns = None,
    impute: Impute = False,
    method: Annotated[
        MethodName,
        typer.Option(
            help="rank-1 factors, mean-field Normals on all weights, SGHMC with a spike-and-slab prior, low-rank "
            "particles, or a codebook of Normals that all weights share"
        ),
    ] = "rank1",
    network: Annotated[NetworkName, typer.Option(help="auto: cnn for images, mlp otherwise")] = "auto",
    epochs: Annotated[
        int, typer.Option(min=1, help="passes over the training data; spike-slab: of warm-up, then one for each draw")
    ] = 60,
    components: Annotated[
        int | None, typer.Option(min=1, help="mixture components of the guide [default: rank1 4, dense 1]")
    ] = None,
    prior: Annotated[
        PriorName | None,
        typer.Option(
            help="prior of the weights [default: rank1 hierarchical-cauchy, dense and bella normal, spike-slab "
            "spike-and-slab, weight-sharing gaussian-mixture of its codes]"
        ),
    ] = None,
    family: Annotated[FamilyName, typer.Option(help="distribution of the guide; cauchy for rank1 only")] = "normal",
    group: Annotated[GroupName, typer.Option(help="what a spike-and-slab prior includes together")] = "weight",
    sparsity: Annotated[
        float | None, typer.Option(min=0, max=0.999, help="share of weights to remove; spike-slab only [default: 0.8]")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="1 is the posterior; spike-slab only")] = 1.0,
    particles_: Annotated[
        int | None, typer.Option("--particles", min=1, help="number of particles; bella only [default: 5]")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="rank of what a particle adds to a weight; bella only [default: 4]")
    ] = None,
    update: Annotated[
        UpdateName | None, typer.Option(help="update of the particles; bella only [default: svgd]")
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            help="what bella and weight-sharing start from, instead of training a deterministic network: the network "
            "of a run folder (for weight-sharing the mean field of a dense run, otherwise the deterministic network), "
            "or, for bella, weights of torchvision (ResNet18_Weights.DEFAULT) with a new last layer"
        ),
    ] = None,
    codes: Annotated[
        int | None, typer.Option(min=1, help="most codes of the codebook; weight-sharing only [default: 256]")
    ] = None,
    sampling: Annotated[
        SamplingName | None,
        typer.Option(
            help="weight-sharing only: codebook and mixture share Normals, shared shares values [default: codebook]"
        ),
    ] = None,
    batch_size: BatchSize = None,
    lr: Annotated[
        float, typer.Option(help="of AdamW, falling to 0 along a cosine; spike-slab: also the step size squared")
    ] = 1e-2,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="draws for a prediction, from each component [default: 16]; bella uses its particles"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of weights, batches and draws")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    out: Annotated[Path | None, typer.Option(help="run folder [default: runs/METHOD-DATA]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in that folder")] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="go on with an interrupted run, with the options it had")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    """Trains a Bayesian network and, with the same budget, its deterministic twin, and compares both on test data.

    Ctrl-C and SIGTERM save what has been trained, and --resume goes on from there.
    """
    if resume is not None:
        with user_errors(ValueError, OSError):
            context.params.update(_resumed(context, resume), out=resume, resume=None)
        context.invoke(fit, context, **context.params)
        return
    console = Console(quiet=quiet or not processes().is_first)
    with user_errors(ValueError, OSError):
        source = DataOptions(data, target, task_, drop, split, category, impute)
        asked: dict[str, Any] = {
            **source.asked(),
            "network": None if network == "auto" else network,
            "epochs": epochs,
            "components": components,
            "prior": prior,
            "family": family,
            "group": group,
            "sparsity": sparsity,
            "temperature": temperature,
            "particles": particles_,
            "rank": rank,
            "update": update,
            "pretrained": pretrained,
            "codes": codes,
            "sampling": sampling,
            "batch_size": batch_size,
            "lr": lr,
            "samples": samples,
            "seed": seed,
        }
        check(method, asked)
        weights = None
        if method == "bella" and pretrained is not None and not Path(pretrained).exists():
            weights = find_weights(pretrained)
        if weights is not None and network != "auto":
            raise ValueError(f"--pretrained {pretrained} has its own network: leave out --network")
        place = find_device(device)
        task = source.read(size=IMAGE_SIZE if weights is None else image_size(weights))
        folder = out or Path("runs") / f"{method}-{task.name}"
        require_folder(folder)
        require_free(folder / "config.json", f"{str(folder)!r} already holds a run", overwrite)
        asked["device"] = str(place)
        if weights is not None:
            asked["network"] = asked["pretrained"] = weights
        elif pretrained is not None:
            asked["pretrained"] = str(Path(pretrained).resolve())
        options = complete(method, asked, task)
        net = new_network(options, task, console)
        known, field = None, None
        if pretrained is not None and not weights:
            known, field = _pretrained(Path(pretrained), options, net, task)
        state = Unfinished(folder, f"pyro-bnn fit --resume {folder}")
        goes_on = state.begin(_command(context.params), overwrite)

    with user_errors(ArithmeticError, ValueError, OSError):
        if goes_on:
            console.print(f"Going on with the run in {folder}", soft_wrap=True, highlight=False)
        if known is not None:
            which = "mean field" if method == "weight-sharing" and field is not None else "deterministic network"
            console.print(f"The {which} of {pretrained}", soft_wrap=True, highlight=False)
        elif weights is not None:
            console.print(
                f"{weights} with a new last layer: first the deterministic network is fine-tuned, then particles start "
                "from the given weights, each with its own last layer",
                soft_wrap=True,
                highlight=False,
            )
        elif method == "bella":
            console.print("No --pretrained: first the deterministic network, then particles around it")
        elif method == "weight-sharing":
            console.print("No --pretrained: first the deterministic network, then codes for its weights")
        for note in notes_of(task):
            console.print(f"Note: {note}", soft_wrap=True, highlight=False)
        with state.stopping():
            fitted = train_and_score(net, task, options, console, state, known, field)
        if not processes().is_first:
            return
        runs.save(folder, task, options, fitted)
        state.end()
    console.print(table_of_metrics(fitted.metrics, options, task.name))
    console.print(f"Saved in {folder}", soft_wrap=True, highlight=False)
    with user_errors(runs.ArvizFileError, exit_code=1):
        runs.save_for_arviz(folder, task, options, fitted.posterior)


#: options that do not change what a run finds
_ASIDE = ("out", "overwrite", "quiet", "resume")


def _command(params: dict[str, Any]) -> dict[str, Any]:
    """The options of the command, for the same command in any folder."""
    found = {name: value for name, value in params.items() if name not in _ASIDE}
    for name in ("data", "pretrained"):
        if found[name] is not None and Path(found[name]).exists():
            found[name] = str(Path(found[name]).resolve())
    return found


def _resumed(context: typer.Context, run: Path) -> dict[str, Any]:
    """The options that an interrupted run had.

    :raises ValueError: when the command has others beside ``--resume``.
    """
    own = [p.opts[0] for p in context.command.params if p.name not in ("resume", "quiet")]
    names = {p.name: p.opts[0] for p in context.command.params}
    given = [
        names[name]
        for name in context.params
        if name in names
        and names[name] in own
        and context.get_parameter_source(name) is not None
        and context.get_parameter_source(name).name == "COMMANDLINE"  # type: ignore[union-attr]
    ]
    if given:
        raise ValueError(f"--resume {run} goes on with the options that the run had: leave out {', '.join(given)}")
    return Unfinished(run, "").asked()


def _pretrained(folder: Path, options: Options, net: nn.Module, task: Task) -> tuple[Trained, pb.Posterior | None]:
    """The deterministic network of another run on data of the same form, and its mean field, if it has one."""
    theirs = runs.read(folder)
    if (theirs.options.network, theirs.in_shape) != (options.network, tuple(task.x_train.shape[1:])):
        raise ValueError(
            f"--pretrained {folder} holds the network {theirs.options.network!r} for inputs of shape "
            f"{theirs.in_shape}; this run has {options.network!r} for {tuple(task.x_train.shape[1:])}"
        )
    field = theirs.options.method == "dense" and theirs.options.components == 1
    return theirs.twin(net), theirs.posterior(net) if field else None
