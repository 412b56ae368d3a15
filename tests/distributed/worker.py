"""Programs of one rank of two: train cases and save their logs and weights; run `pivotune train` and resume it."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import build, build_model
from run_folders import as_it_was_at_step_2
from safetensors.torch import save_file
from tiny_training import make_pairs, step_logs
from transformers import PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from pivotune.cli.main import main
from pivotune.models.sharding import is_fsdp
from pivotune.runs.export import gathered_model
from pivotune.training.distributed import ranks
from pivotune.training.trainer import DeepSupervisionTrainer


def shard_on_cpu(**plugin: Any) -> None:
    """Have Accelerate use FSDP2 on a CPU, where it knows plain data parallelism only; everything else is its own."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    make_state = AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make_state(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = kwargs["fsdp_plugin"]
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init
    settings = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False,
                "state_dict_type": "FULL_STATE_DICT", "reshard_after_forward": True, **plugin}  # fmt: skip
    from accelerate import Accelerator

    make = Accelerator.__init__

    def with_plugin(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{**kwargs, "fsdp_plugin": FullyShardedDataParallelPlugin(**settings)})

    Accelerator.__init__ = with_plugin


def deepspeed_settings(stage: int) -> dict[str, Any]:
    """ZeRO as `configs/accelerate/zero*.yaml` ask for it; parameters of any size are partitioned."""
    from accelerate.state import DistributedType, PartialState

    # Accelerate leaves the choice of a backend to a GPU.
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    # A faster all-reduce within a machine, which would be compiled first.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}  # fmt: skip
    return {
        "deepspeed": {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
        "use_cpu": False,
    }


def whole_weights(trainer: Any, make_model: Any) -> dict[str, torch.Tensor]:
    """All weights on the first rank, under the names that they have in one process."""
    model = gathered_model(trainer, make_model)
    return {} if model is None else {name: tensor.clone() for name, tensor in model.state_dict().items()}


class ReductionCheck(DeepSupervisionTrainer):
    """Every micro-batch must leave its gradients added up in float32 and in shards, on no rank those of the whole model."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        for module in self.model.modules():
            if is_fsdp(module) and (group := module._get_fsdp_state()._fsdp_param_group) is not None:
                assert group.mp_policy.reduce_dtype in (None, torch.float32)
                for parameter in group.fsdp_params:
                    assert parameter.unsharded_accumulated_grad is None
                    assert parameter.unsharded_param.grad is None
                self.checked_groups = getattr(self, "checked_groups", 0) + 1
        return loss


def run_cases(engine: str, path: str, names: list[str]) -> None:
    """Train cases (see `cases.py`); their results lie in the folder by name."""
    folder = Path(path)
    warnings.simplefilter("ignore")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if engine.startswith("fsdp2"):
        shard_on_cpu(activation_checkpointing=engine == "fsdp2-checkpointing")
    for name in names:
        changes = {"bf16": True} if engine.endswith("bf16") else {}
        if engine.startswith("zero"):
            changes = deepspeed_settings(int(engine[-1]))
        trainer = build(name, folder / f"run-{name}", world_size, **changes)
        trainer.__class__ = ReductionCheck
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        assert is_fsdp(trainer.model_wrapped) == engine.startswith("fsdp2") == hasattr(trainer, "checked_groups")
        held_out = trainer.evaluate(make_pairs(7, seed=1))
        weights = whole_weights(trainer, partial(build_model, name, seed=1))
        if rank == 0:
            save_file(weights, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps({"logs": step_logs(trainer), "held_out": held_out}))
        print(f"rank {rank}: {name} done", flush=True)
        # Transformers would make the next model partitioned.
        unset_hf_deepspeed_config()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train(path: Path, *words: str) -> None:
    # Accelerate leaves it for later programs of a process, and FSDP2 on a CPU is refused where it is asked for.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    code = main(["train", str(path / "run.yaml"), *words])
    assert code == 0, f"exit code {code}"


def run_and_resume(engine: str, folder: str) -> None:
    """Run `a` as `run.yaml` describes; resume `b`, a copy of `a` at step 2, and `c`, a run of one process, if present."""
    path = Path(folder)
    warnings.simplefilter("ignore")
    if engine.startswith("fsdp2"):
        kind = "SHARDED_STATE_DICT" if engine == "fsdp2-sharded" else "FULL_STATE_DICT"
        shard_on_cpu(state_dict_type=kind)
    train(path, "--set", f"output_dir={path / 'a'}")
    ranks.on_main(lambda: as_it_was_at_step_2(path / "a", path / "b"))
    train(path, "--set", f"output_dir={path / 'b'}", "--resume")
    if (path / "c").exists():
        train(path, "--set", f"output_dir={path / 'c'}", "--resume")
    torch.distributed.destroy_process_group()
