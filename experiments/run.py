"""One run: skip it if it is finished, otherwise train, measure, and write its record."""

from __future__ import annotations

import inspect
import json
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from .config import build, config_hash, identity, recipe_note, run_dir, run_id
from .dataset import check_data, other_rows
from .provenance import git_commit, hardware, versions
from .store import ERROR, LOCK, RESULT, ROUTES, SCHEMA, lock, read_record, write_record, write_routes

CHECKPOINT = "last.ckpt"

# Lightning's, each answered: in-memory slices need no loader workers, nothing is logged within an epoch, a run resumes
# in its own directory with its own callbacks; the last is torch's own affair.
_REMARKS = (
    ".*does not have many workers",
    ".*smaller than the logging interval",
    ".*directory .* exists and is not empty",
    "Be aware that when using `ckpt_path`",
    ".*LeafSpec",
)


class Outcome(NamedTuple):
    """status: "finished", "skipped" (it was already), "failed", or "busy" (another process is running it).
    error: last line of the exception of a failed run."""

    status: str
    run_dir: Path
    error: str = ""


def run(cfg: DictConfig, progress_bar: bool = False) -> Outcome:
    """Run one configuration in its directory, unless its record is there. Failures are told, not raised.

    Nothing heavy is imported before it is certain that there is something to do.
    """
    plain = identity(cfg)
    digest = config_hash(plain)
    folder = run_dir(cfg, plain)
    with lock(folder) as owned:
        if not owned:
            return Outcome("busy", folder)
        record, reason = read_record(folder, digest)
        if record is not None and not cfg.force:
            if other := other_rows(OmegaConf.to_container(cfg.data, resolve=True), record):
                print(f"{folder / RESULT}: {other}; force=true runs it again", file=sys.stderr, flush=True)
            return Outcome("skipped", folder)
        if reason:
            print(f"{reason}; running it again", file=sys.stderr, flush=True)
        # A record that is whole stays until another one takes its place.
        for name in (ERROR,) if record is not None else (RESULT, ROUTES, ERROR):
            (folder / name).unlink(missing_ok=True)
        if cfg.force:
            (folder / CHECKPOINT).unlink(missing_ok=True)
        try:
            measured = train(cfg, folder, progress_bar)
            record = {
                "schema": SCHEMA,
                "study": cfg.study,
                "recipe": cfg.recipe,
                "run_id": run_id(plain),
                "config": plain,
                "config_hash": digest,
                "seed": cfg.seed,
                "status": "finished",
                **measured,
            }
            write_record(folder, record)
            if "routes" not in measured:
                (folder / ROUTES).unlink(missing_ok=True)
        except Exception as error:
            (folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
            return Outcome("failed", folder, last_line(error))
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return Outcome("finished", folder)


def job(cfg: DictConfig) -> None:
    """What Hydra calls for each configuration, in whichever process; a sweep tells the outcome by itself."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    single = HydraConfig.get().mode == RunMode.RUN
    if single and (note := recipe_note(HydraConfig.get().runtime.choices, GlobalHydra.instance().config_loader())):
        print(note, file=sys.stderr, flush=True)
    bar = cfg.trainer.progress_bar
    outcome = run(cfg, progress_bar=single and sys.stderr.isatty() if bar is None else bar)
    if single:
        report(outcome, cfg)


def report(outcome: Outcome, cfg: DictConfig) -> None:
    """Print the outcome of a single run; end the program with code 1 if there is no result."""
    if outcome.status == "failed":
        error = outcome.run_dir / ERROR
        # A ValueError or OSError is told in full by its message (a user's mistake, a missing file).
        told = outcome.error.startswith(("ValueError", "OSError", "FileNotFoundError"))
        text = outcome.error if told else error.read_text(encoding="utf-8").strip()
        print(f"{text}\nfailed; traceback in {error}", file=sys.stderr)
        sys.exit(1)
    if outcome.status == "busy":
        owner = (outcome.run_dir / LOCK).read_text(encoding="utf-8").strip()
        print(f"{outcome.run_dir.name} is already being run by {owner}", file=sys.stderr)
        sys.exit(1)
    record = json.loads((outcome.run_dir / RESULT).read_text(encoding="utf-8"))
    already = "  (finished before; force=true runs it again)" if outcome.status == "skipped" else ""
    print(f"{outcome.run_dir.name}  {summary(record)}{already}\n{outcome.run_dir / RESULT}")


def summary(record: dict[str, Any]) -> str:
    """The measured values that say most, in one line."""
    metrics = record["metrics"]
    parts = [f"{name} {100 * metrics[name]:.1f} %" for name in ("ma", "ga") if metrics.get(name) is not None]
    if metrics.get("bits_per_character") is not None:
        parts.append(f"{metrics['bits_per_character']:.3f} bits per character")
    # Several dense layers have several "leaves", and none of them is a choice.
    routed = metrics["training_width"] > metrics["inference_width"]
    if routed and metrics["leaves_used"] is not None:
        parts.append(f"leaves {metrics['leaves_used']}/{metrics['num_leaves']}")
    if metrics.get("diverged"):
        parts.append("DIVERGED")
    return "  ".join([*parts, f"{record['wall_time_s']:.1f} s"])


def last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def train(cfg: DictConfig, folder: Path, progress_bar: bool) -> dict[str, Any]:
    """Train and measure: the part of the record that is not known beforehand."""
    commit = git_commit()
    # A missing set is found before torch is imported.
    check_data(OmegaConf.to_container(cfg.data, resolve=True))

    import torch

    torch.set_num_threads(cfg.threads)
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from .elapsed import Elapsed

    for remark in _REMARKS:
        warnings.filterwarnings("ignore", message=remark)

    elapsed = Elapsed()
    data = build(cfg.data)
    data.prepare_data()
    data.setup()
    # Again before the model, so that its initial weights do not depend on what the data drew.
    seed_everything(cfg.seed, verbose=False)
    known = {"num_classes": data.num_classes, "in_shape": data.in_shape, "in_features": data.in_features}
    model = build(cfg.model)
    model = model(make_ff=build(cfg.layer), **_accepted(model, known))
    task = build(cfg.task)
    task = task(model, **_accepted(task, known))

    callbacks, checkpoint = [elapsed, *task.protocol_callbacks()], None
    if cfg.trainer.checkpoint_every is not None:
        from lightning.pytorch.callbacks import ModelCheckpoint

        callbacks.append(
            ModelCheckpoint(
                dirpath=folder,
                filename=Path(CHECKPOINT).stem,
                every_n_epochs=cfg.trainer.checkpoint_every,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            )
        )
        checkpoint = _readable(folder / CHECKPOINT)
    trainer = Trainer(
        max_epochs=cfg.trainer.max_epochs,
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        precision=cfg.trainer.precision,
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
        limit_train_batches=cfg.trainer.max_batches,
        callbacks=callbacks,
        logger=_logger(cfg.logger, folder, checkpoint is not None) if cfg.logger else False,
        enable_checkpointing=cfg.trainer.checkpoint_every is not None,
        enable_progress_bar=progress_bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:
        # Lightning answers Ctrl-C by exit(1), where it must end the whole sweep, and say so, and SIGTERM by an exit
        # that counts as success.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        if isinstance(stop, SIGTERMException):
            print(f"terminated in {folder}; the same command goes on", file=sys.stderr, flush=True)
            raise SystemExit(128 + signal.SIGTERM) from stop
        raise
    measured = task.results(data)
    if getattr(task, "keep_routes", False) and (routes := task.routes(data)) is not None:
        write_routes(folder, routes)
        measured["routes"] = ROUTES
    return {
        **measured,
        "wall_time_s": round(elapsed.seconds, 3),
        "resumed": checkpoint is not None,
        "data_digest": getattr(data, "content_digest", None),
        "hardware": {**hardware(), "device": str(trainer.strategy.root_device)},
        "versions": versions(),
        "git_commit": commit,
    }


def _logger(node: DictConfig, folder: Path, resumed: bool) -> Any:
    """Writes into the run's folder, unless the configuration names another one. A run that goes on begins a metrics.csv
    of its own, and Lightning would delete the one before: that becomes metrics.1.csv, or the next number."""
    before = folder / "metrics.csv"
    if resumed and before.exists():
        before.rename(folder / f"metrics.{1 + len(list(folder.glob('metrics.*.csv')))}.csv")
    return build(node, **({} if "save_dir" in node else {"save_dir": str(folder)}))


def _accepted(function: Callable, known: dict[str, Any]) -> dict[str, Any]:
    """Those of the facts about the data that `function` has an argument for."""
    return {name: value for name, value in known.items() if name in inspect.signature(function).parameters}


def _readable(checkpoint: Path) -> Path | None:
    import torch

    if not checkpoint.exists():
        return None
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        print(f"{checkpoint} is unreadable ({last_line(error)}); starting from the first epoch", file=sys.stderr)
        return None
    return checkpoint
