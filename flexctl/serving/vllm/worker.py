"""What the check at start asks of each worker, by vLLM's ``--worker-extension-cls``."""

from __future__ import annotations

from typing import Any

__all__ = ["Negation"]


class Negation:
    """Becomes part of vLLM's worker."""

    model_runner: Any

    def flexctl_negate(self, expert: int) -> int:
        """Turn the sign of everything that an expert says, in place and exactly; a second time undoes it.

        Returns:
            In how many layers this worker has it.
        """
        from vllm.model_executor.layers.fused_moe import RoutedExperts

        turned = 0
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, RoutedExperts):
                local = layer._map_global_expert_id_to_local_expert_id(expert)
                if local >= 0:
                    layer.w2_weight.data[local].neg_()
                    turned += 1
        return turned
