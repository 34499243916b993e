"""Memorisation and generalisation accuracy of one training run (FFF paper, section 3.1), and what is told with them.

After each epoch the hard route is evaluated on all training rows and on the validation rows. Memorisation accuracy (MA)
is the best training accuracy over the epochs; generalisation accuracy (GA) is the test accuracy of the weights with the
best validation accuracy; the epochs (from 1) that reached them first are their ETT. Training stops when `patience`
epochs in a row improved neither, after an epoch whose task loss is at most `stop_loss`, and after an epoch whose loss
or whose weights at the end are not finite: such an epoch is in the history, but never among the best.

T rows, E experts, N tree nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fff.layers.contract import RoutedLayer, node_tracing, routing, soft_evaluation

USAGE_METRICS = ("leaves_used", "largest_leaf_share", "node_entropy", "nodes_below_0.10", "leaf_load")
_SIZES = ("training_width", "inference_width", "training_size", "inference_size", "flops_per_row")
HISTORY = ("epoch", "train_loss", "train_accuracy", "val_accuracy", "node_entropy", "leaves_used")


class LayerUsage(NamedTuple):
    """How one layer routed a set of rows.

    rows: T, over all batches.
    load: (E,) rows that the hard route sent to each expert.
    node_entropy: (N,) mean Bernoulli entropy of each node in nats; None without a tree. Nodes of the first 7 levels:
        over all rows. Deeper ones (`TreeTrace`): where one leaf per tree is evaluated, nan; where several are or the
        weight of the leaf is its probability, over the rows that came by, each batch weighted by all its rows (exact
        for a single batch), nan where none came.
    """

    rows: int
    load: Tensor
    node_entropy: Tensor | None


class Evaluation(NamedTuple):
    """What a model does with a set of rows.

    accuracy: of the hard route, 0..1; where a row has a target at each of its places, over the places.
    soft_accuracy: of the soft mixture; None where it was not asked for or no layer has one.
    usage: one entry for each layer that ran.
    backend: names of the `expert_mlp` backends that the hard route used.
    """

    accuracy: float
    soft_accuracy: float | None
    usage: list[LayerUsage]
    backend: str

    @property
    def node_entropy(self) -> Tensor | None:
        """Entropy of every node that was evaluated (`LayerUsage`), all layers in one vector; None where none was."""
        layers = [usage.node_entropy for usage in self.usage if usage.node_entropy is not None]
        if not layers:
            return None
        entropy = torch.cat(layers)
        entropy = entropy[~entropy.isnan()]
        return entropy if len(entropy) else None

    @property
    def mean_node_entropy(self) -> float | None:
        entropy = self.node_entropy
        return None if entropy is None else entropy.mean().item()

    @property
    def layer_node_entropy(self) -> list[float]:
        """Mean over the evaluated nodes of each layer with a tree, nan where none was."""
        return [usage.node_entropy.nanmean().item() for usage in self.usage if usage.node_entropy is not None]

    @property
    def leaves_used(self) -> int:
        """Experts with at least one row, over all layers."""
        return sum(int((usage.load > 0).sum()) for usage in self.usage)

    @property
    def usage_metrics(self) -> dict[str, Any]:
        """By the names in `USAGE_METRICS`: loads of several layers are chained, the largest share is that of any."""
        entropy = self.node_entropy
        return {
            "leaves_used": self.leaves_used,
            "largest_leaf_share": max((usage.load.max().item() / usage.rows for usage in self.usage), default=None),
            "node_entropy": self.mean_node_entropy,
            "nodes_below_0.10": None if entropy is None else (entropy < 0.10).double().mean().item(),
            "leaf_load": [count for usage in self.usage for count in usage.load.tolist()],
        }

    @property
    def usage_history(self) -> dict[str, float | None]:
        """What a history tells of the routing of an epoch; of several trees the entropy of each, too."""
        layers = self.layer_node_entropy if len(self.layer_node_entropy) > 1 else []
        known = (None if math.isnan(entropy) else entropy for entropy in layers)
        return {
            "node_entropy": self.mean_node_entropy,
            "leaves_used": self.leaves_used,
            **{f"node_entropy_{number}": entropy for number, entropy in enumerate(known, start=1)},
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    soft: bool = False,
    observe: Callable[[Tensor, Tensor], Any] | None = None,
) -> Evaluation:
    """Accuracy and routing of `model` over (x, y) `batches`, in evaluation mode; every module's mode is put back.

    soft: evaluate the soft mixture too.  observe: called with the logits of the hard route and the targets.
    """
    parameter = next(model.parameters())
    soft = soft and any(isinstance(m, RoutedLayer) and hasattr(m, "soft_eval") for m in model.modules())
    hits = torch.zeros((), dtype=torch.int64, device=parameter.device)
    soft_hits = hits.clone()
    rows = 0
    records: dict[str, list] = {}
    backend = ""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for x, y in batches:
            x, y = x.to(parameter) if x.is_floating_point() else x.to(parameter.device), y.to(parameter.device)
            with node_tracing(model):
                logits = model(x)
            for name, record in routing(model):
                records.setdefault(name, []).append((len(record.index), record.load, record.node_entropy))
            backend = backend or backends(model)
            hits += (logits.argmax(-1) == y).sum()
            rows += y.numel()
            if observe is not None:
                observe(logits, y)
            if soft:
                with soft_evaluation(model):
                    soft_hits += (model(x).argmax(-1) == y).sum()
    finally:
        for module, training in modes:
            module.training = training
    return Evaluation(
        accuracy=hits.item() / max(rows, 1),
        soft_accuracy=soft_hits.item() / max(rows, 1) if soft else None,
        usage=[_usage(batch_records) for batch_records in records.values()],
        backend=backend,
    )


def dispatch_entropy(index: Tensor, cluster: Tensor) -> float:
    """Mean entropy, in nats, of the clusters of the rows that an expert takes, each expert weighted by its share of the
    choices: 0 where every expert knows one cluster, the entropy of the clusters where none specialises.

    Chen et al. 2022 (arXiv 2208.02813), section 6.  index: (T, K) chosen experts, -1 for none.  cluster: (T,) from 0.
    """
    num_clusters = int(cluster.max()) + 1
    pair = (index * num_clusters + cluster[:, None])[index >= 0]
    rows = torch.bincount(pair, minlength=(int(index.max()) + 1) * num_clusters).view(-1, num_clusters).double()
    load = rows.sum(1)
    entropy = torch.special.entr(rows / load.clamp(min=1)[:, None]).sum(1)
    return float((load * entropy).sum() / load.sum())


def _usage(records: list[tuple[int, Tensor, Tensor | None]]) -> LayerUsage:
    rows = sum(count for count, _, _ in records)
    load = torch.stack([batch_load for _, batch_load, _ in records]).sum(0)
    if records[0][2] is None:
        return LayerUsage(rows, load, None)
    entropy = torch.stack([batch_entropy for _, _, batch_entropy in records]).double()  # (batches, N)
    weight = torch.tensor([count for count, _, _ in records], device=entropy.device, dtype=entropy.dtype)
    weight = weight[:, None] * ~entropy.isnan()
    return LayerUsage(rows, load, (entropy.nan_to_num() * weight).sum(0) / weight.sum(0))


class Best:
    """The first epoch with the highest accuracy so far, and a copy of the weights it had."""

    def __init__(self) -> None:
        self.accuracy = -math.inf
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}

    def offer(self, accuracy: float, epoch: int, model: nn.Module) -> None:
        if accuracy > self.accuracy:
            self.accuracy, self.epoch = accuracy, epoch
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}


class Protocol(Callback):
    """Keeps the books of one run; `task.results` reads them. Everything is in the checkpoint.

    The data module must give `train_eval_dataloader()` and `val_dataloader()`. The history's routing columns (mean
    entropy of the evaluated nodes, experts in use) are those of the training rows; of a model with several trees it has
    the entropy of each too, `node_entropy_1` of the first.
    """

    def __init__(self, patience: int, stop_loss: float | None = None) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience} must be at least 1 epoch")
        self.patience, self.stop_loss = patience, stop_loss
        self.history: dict[str, list] = {name: [] for name in HISTORY}
        self.best = {"train": Best(), "val": Best()}
        self.diverged = False
        self.training_backend = ""

    @property
    def finished(self) -> bool:
        last_gain = max(best.epoch for best in self.best.values())
        loss = self.history["train_loss"][-1] if self.history["train_loss"] else None
        learnt = None not in (self.stop_loss, loss) and loss <= self.stop_loss
        return self.diverged or learnt or len(self.history["epoch"]) - last_gain >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self.history,
            "best": {name: vars(best) for name, best in self.best.items()},
            "diverged": self.diverged,
            "training_backend": self.training_backend,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        for name, values in state_dict["best"].items():
            vars(self.best[name]).update(values)
        self.diverged = state_dict["diverged"]
        self.training_backend = state_dict["training_backend"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        if not hasattr(data, "train_eval_dataloader"):
            raise ValueError(f"datamodule={data!r} of trainer.fit must have train_eval_dataloader()")
        self._train_rows, self._val_rows = data.train_eval_dataloader(), data.val_dataloader()
        # A run resumed from a checkpoint of its last epoch must not train one epoch more.
        trainer.should_stop = trainer.should_stop or self.finished

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = pl_module.model
        self.training_backend = backends(model)
        losses = pl_module.pop_epoch_losses()
        train, val = evaluate(model, self._train_rows), evaluate(model, self._val_rows)

        epoch = len(self.history["epoch"]) + 1
        # The last step may spoil the weights after a loss that was still finite.
        self.diverged = not (math.isfinite(losses["loss"] + losses["aux_loss"]) and is_finite(model))
        if not self.diverged:
            self.best["train"].offer(train.accuracy, epoch, model)
            self.best["val"].offer(val.accuracy, epoch, model)
        row = {
            "epoch": epoch,
            "train_loss": losses["loss"] if math.isfinite(losses["loss"]) else None,
            "train_accuracy": train.accuracy,
            "val_accuracy": val.accuracy,
            **train.usage_history,
        }
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)

        pl_module.log_dict({"train_accuracy": train.accuracy, "val_accuracy": val.accuracy}, prog_bar=True)
        if trainer.loggers:  # each value costs 0.3 ms, which a sweep without a logger saves
            pl_module.log_dict({f"train_{name}": value for name, value in losses.items()})
            routed = {"leaves_used": float(train.leaves_used), "node_entropy": row["node_entropy"]}
            pl_module.log_dict({name: value for name, value in routed.items() if value is not None})
        if self.finished:
            trainer.should_stop = True


def is_finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def backends(model: nn.Module) -> str:
    """Names of the `expert_mlp` backends that the last forward used, sorted."""
    return ",".join(sorted({record.backend for _, record in routing(model)}))


def model_metrics(model: nn.Module) -> dict[str, int]:
    """Sizes of a model whose layers have run, over all of them: their records tell the experts."""
    layers = [layer for layer in model.modules() if isinstance(layer, RoutedLayer)]
    return {
        "num_leaves": sum(record.num_experts for _, record in routing(model)),
        "parameters": sum(p.numel() for p in model.parameters()),
        **{field: sum(getattr(layer.size, field) for layer in layers) for field in _SIZES},
    }


def record_of(metrics: dict[str, Any], history: dict[str, list], trained: str, evaluated: str) -> dict[str, Any]:
    """What `results` of a task gives, all plain Python; nan becomes None.  trained, evaluated: names of backends."""
    return {
        "metrics": {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in metrics.items()
        },
        "history": {name: list(values) for name, values in history.items()},
        "backend": trained if trained == evaluated else f"{trained} (training), {evaluated} (evaluation)",
    }
