"""The Trainer of transformers, told of auxiliary losses as README.md says."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

import fff
from fff.adapt import replace_feedforward

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.adapt

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(16 * 8).view(16, 8) * 7 % 47 + 3]


def gradients(trainer_class, folder, batch_size, steps, counts_tokens=True, **options):
    """Of one step of GPT-2 over ROWS; by parameter name."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 50}
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2))
    replace_feedforward(model, partial(fff.FFF, leaf_width=4, depth=2, mode="straight_through", hardening_weight=1.0))
    model.accepts_loss_kwargs = counts_tokens
    found = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, model=None, **__):
            found.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer_class(model=model, args=arguments, train_dataset=ROWS, callbacks=[Keep()], **options).train()
    return found


def mean_loss(outputs, labels, num_items_in_batch):
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    return losses / num_items_in_batch


@pytest.mark.parametrize(
    "options",
    [{}, {"counts_tokens": False}, {"counts_tokens": False, "compute_loss_func": mean_loss}],
    ids=["of the model", "a mean of means", "a function"],
)
def test_accumulated_batches_are_one(options, tmp_path):
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "RoutedTrainer" in block)
    names = {}
    exec(block, names)
    once, four_times = (gradients(names["RoutedTrainer"], tmp_path, 16 // steps, steps, **options) for steps in (1, 4))
    for name, gradient in once.items():
        torch.testing.assert_close(four_times[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, n=name: n + text)
    plain = gradients(transformers.Trainer, tmp_path, 16, 1, **options)
    node = "transformer.h.0.mlp.node_weight"
    assert not torch.allclose(plain[node], once[node], atol=1e-3)
