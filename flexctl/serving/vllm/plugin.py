"""The plugin: vLLM calls ``register`` in each of its processes. It does nothing unless ``flexctl serve`` asked for it.

What it touches, all of it as in the releases that ``refusals.RELEASES`` lists:

layer      MoERunner, replaced by vLLM's own registry of layers: a row of ``rows.ROWS`` is added to each token's logits
           before the choice of experts and before tokens go to other ranks
worker     both model runners: the rows of the next step are written before it
frontend   InputProcessor.process_inputs: a request that does not say its mask, with the salt of that mask, is refused
"""

from __future__ import annotations

from typing import Any

from flexctl.serving.vllm.masks import KEY, Served, is_salted, served

__all__ = ["register"]

_SPARE_ROWS = 1024
"""Rows beyond the largest batch: a captured graph runs padded batches."""

_registered = False


def register() -> None:
    """Teach this process masks, if it belongs to a server of ``flexctl serve``.

    Raises:
        UsageError: Masks were asked for, and the tests did not run this release of vLLM.
    """
    global _registered
    model = served()
    if model is None or _registered:
        return
    _registered = True
    from flexctl.serving.vllm.refusals import refuse_release

    refuse_release()
    _mask_layers()
    _fill_before_each_step()
    _refuse_unmasked(model)


def _mask_layers() -> None:
    import torch
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.custom_op import PluggableLayer
    from vllm.model_executor.layers.fused_moe import MoERunner
    from vllm.platforms import current_platform

    from flexctl.serving.vllm.rows import ROWS

    class MaskedRunner(MoERunner):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            tokens = get_current_vllm_config().scheduler_config.max_num_batched_tokens + _SPARE_ROWS
            device = torch.device(current_platform.device_type)
            self.flexctl_rows = ROWS.table(tokens, self.moe_config.num_logical_experts, device)

        def _maybe_dispatch(self, hidden_states: Any, router_logits: Any) -> Any:
            rows = self.flexctl_rows[: router_logits.shape[0]].to(router_logits.dtype)
            return super()._maybe_dispatch(hidden_states, router_logits + rows)

    PluggableLayer.register_oot(MaskedRunner, name="MoERunner")


def _fill_before_each_step() -> None:
    import vllm.v1.worker.gpu.model_states as states
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from flexctl.serving.vllm.rows import ROWS

    prepare = GPUModelRunner._prepare_inputs

    def prepare_inputs(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = prepare(self, scheduler_output, *args, **kwargs)
        ids = self.input_batch.req_ids
        masks = [_mask(self.requests[name].sampling_params) for name in ids]
        ROWS.fill(masks, [scheduler_output.num_scheduled_tokens[name] for name in ids])
        return prepared

    GPUModelRunner._prepare_inputs = prepare_inputs

    # The newer model runner keeps what belongs to a request in a state of the model's own.
    resolve = states.resolve_model_state_cls

    def resolve_model_state_cls(vllm_config: Any, model: Any) -> Any:
        class MaskedState(resolve(vllm_config, model)):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self._flexctl_masks: dict[int, str] = {}

            def add_request(self, req_index: int, new_req_data: Any) -> None:
                super().add_request(req_index, new_req_data)
                self._flexctl_masks[req_index] = _mask(new_req_data.sampling_params)

            def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
                count = input_batch.num_reqs
                masks = [self._flexctl_masks[int(index)] for index in input_batch.idx_mapping_np[:count]]
                ROWS.fill(masks, input_batch.num_scheduled_tokens[:count])
                return super().prepare_inputs(input_batch, req_states)

        return MaskedState

    states.resolve_model_state_cls = resolve_model_state_cls


def _mask(params: Any) -> str:
    """Return the mask in a request's sampling params; vLLM's own warm-up has none."""
    return str((params.extra_args or {}).get(KEY, "")) if params is not None else ""


def _refuse_unmasked(model: Served) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    process = InputProcessor.process_inputs

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        params = request.sampling_params
        mask = (params.extra_args or {}).get(KEY) if params is not None else None
        if mask is None or not is_salted(request.cache_salt, model.digest, mask):
            said = "flexctl: this way of asking cannot say which experts may answer; use /v1/completions or "
            raise VLLMValidationError(f"{said}/v1/chat/completions, without beam search")
        return request

    InputProcessor.process_inputs = process_inputs
