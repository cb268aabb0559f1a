"""Expert parallelism of one engine: whether it applies, its share of the model, and how its placement changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from transformers import PreTrainedModel

from raycore.engines.torch.expert_exchange import UNPLACED, ExpertExchange
from raycore.engines.torch.expert_loading import ExpertModel, experts_of, find_expert_model, load_share, own_slots
from raycore.engines.torch.expert_map import ExpertMap, LayerMap, check_form, check_map, even_map, given_map
from raycore.engines.torch.expert_moves import SwapPlan
from raycore.engines.torch.expert_rebalance import Rebalance
from raycore.engines.torch.expert_swap import ExpertSwap
from raycore.engines.torch.loading import Source, find_source
from raycore.engines.torch.options import TorchEngineOptions
from raycore.errors import ConfigurationError, EngineStateError, InvalidArgumentsError, LockstepError, NotSupportedError
from raycore.groups import ProcessGroup


def _nothing(found: ExpertModel) -> ExpertMap:
    """Where a rank is that has yet to be given its experts."""
    return {layer: LayerMap(((),)) for layer in found.experts}


@final
class ExpertParallel:
    """One rank's part of a mixture-of-experts model; made by `load`.

    A change of members goes: `prepare` on every old and new member, `advance` until it says that all has come, `switch` between the
    same two steps, then `drop`; before `drop`, `revert` undoes the switch. The engine is given the new members' process group at the
    switch.
    """

    def __init__(
        self,
        source: Source,
        options: TorchEngineOptions,
        found: ExpertModel,
        placed: ExpertMap,
        size: int,
        model: PreTrainedModel | None = None,
    ) -> None:
        """`model`: this rank's share, where it did not come from disk."""
        self._source = source
        self._options = options
        self._found = found
        rank = 0 if size == UNPLACED else options.rank
        slots = {layer: own_slots(rows.rows[rank]) for layer, rows in placed.items()}
        self.model: PreTrainedModel = model if model is not None else load_share(source, options, found, slots)
        self.exchange = ExpertExchange(experts_of(self.model), placed, found.experts, rank=rank, size=size)
        self.on_changed: Callable[[], None] = lambda: None
        """Called when tensors of experts have been replaced."""
        self._swap: ExpertSwap | None = None
        self._before: tuple[ExpertMap, int, int] | None = None
        self._rebalance: Rebalance | None = None
        self._received_bytes = 0

    @classmethod
    def load(cls, options: TorchEngineOptions) -> ExpertParallel | None:
        """This rank's share of the model, or None where the engine is to load all of it. ConfigurationError for what cannot be."""
        wanted = options.expert_parallel
        if wanted is False or (wanted is None and not options.data_parallel_size):
            return None
        source = find_source(options.model)
        found = find_expert_model(source)
        if found is None:
            if wanted:
                raise ConfigurationError(
                    f"expert_parallel: model {options.model!r} has no experts that go through transformers' experts interface"
                )
            return None
        if options.is_joining:
            return cls(source, options, found, _nothing(found), UNPLACED)
        size = max(1, options.data_parallel_size)
        if not 0 <= options.rank < size:
            raise ConfigurationError(f"expert_parallel: rank {options.rank} is none of the {size} ranks that the experts are placed on")
        if options.expert_placement is not None:
            placed = given_map(options.expert_placement, found.experts, size)
        else:
            placed = even_map(found.experts, size, options.expert_slots)
        return cls(source, options, found, placed, size)

    @classmethod
    def of_peers(cls, options: TorchEngineOptions, found: ExpertModel, model: PreTrainedModel) -> ExpertParallel:
        """The share of a rank that joins, everything but its experts taken from its peers."""
        return cls(Source(Path(options.model).expanduser()), options, found, _nothing(found), UNPLACED, model)

    @property
    def sync_interval(self) -> int:
        """Ranks of a pool agree before every step; without a pool there is nobody to agree with."""
        return 1 if self._options.data_parallel_size else 0

    @property
    def may_record(self) -> bool:
        """Whether steps can be CUDA graphs: an exchange between ranks cannot, its sizes are only known when it happens."""
        return self.exchange.is_alone

    def reload(self) -> PreTrainedModel:
        """This rank's share as its tensors hold it now, from the checkpoint."""
        return load_share(self._source, self._options, self._found, self._held())

    def labels(self) -> dict[str, list[int]]:
        """Which experts the rows of a module's tensors are, by the module's name; empty ones are -1."""
        names = {id(module): name for name, module in self.model.named_modules()}
        held = self._held()
        return {names[id(state.module)]: held[layer] for layer, state in self.exchange.layers.items()}

    def check_whole(self, what: str) -> None:
        """NotSupportedError unless this rank's tensors are those of a checkpoint."""
        for layer, held in self._held().items():
            experts = self._found.experts[layer]
            if held != list(range(experts)):
                raise NotSupportedError(
                    f"{what}: this rank holds {len(held)} of {experts} experts; an expert-parallel model is saved by nobody yet"
                )

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the parameters that hold experts."""
        names = {id(module): name for name, module in self.model.named_modules()}
        return frozenset(f"{names[id(state.module)]}.{leaf}" for state in self.exchange.layers.values() for leaf in state.slots.names)

    @property
    def has_work(self) -> bool:
        """Whether steps are wanted for the experts' sake: a rebalancing goes on in them."""
        return self._rebalance is not None

    # -- steps ----------------------------------------------------------------------------------------------------------------

    def begin_step(self, *, is_idle: bool) -> None:
        """Before each forward pass of a step: the group is right, and a rebalancing goes on by a portion. LockstepError otherwise."""
        self.exchange.begin(is_idle=is_idle)
        rebalance = self._rebalance
        if rebalance is None:
            return
        try:
            changed = rebalance.on_step()
        except LockstepError:
            self._end_rebalance()
            raise
        if changed:
            self.on_changed()
        if rebalance.is_over:
            self._end_rebalance()

    def _end_rebalance(self) -> None:
        if self._rebalance is not None:
            self._received_bytes += self._rebalance.received_bytes
            self._rebalance.close()
            self._rebalance = None

    # -- a change of members --------------------------------------------------------------------------------------------------

    def prepare(self, plan: SwapPlan, group: ProcessGroup, *, budget_bytes: int) -> None:
        """Begin a change over `group`, which has all old and new members and may serve or not; nothing live changes.

        The plan's rows are numbered by the ranks of `group` (`plan_of` makes them of an `ExpertChange`). A new member was loaded with
        `is_joining`: it holds no expert yet and has read none. ConfigurationError for a plan that cannot be, EngineStateError while another
        change is under way.
        """
        if self._swap is not None or self._rebalance is not None:
            raise EngineStateError("another change of the experts' placement is under way")
        check_map(plan.after, self._found.experts, group.size)
        check_form(plan.before, self._found.experts, group.size)
        layers = {layer: state.slots for layer, state in self.exchange.layers.items()}
        differs = next((layer for layer, slots in layers.items() if plan.before[layer].rows[group.rank] != slots.slots), None)
        if differs is not None:
            raise ConfigurationError(
                f"the plan begins with experts {list(plan.before[differs].rows[group.rank])} in layer {differs} of rank {group.rank}, "
                f"which has {list(layers[differs].slots)}"
            )
        self._swap = ExpertSwap(plan, group, layers, budget_bytes)

    def advance(self) -> bool:
        """Carry a portion, with all ranks of the group at once; whether all experts have come. LockstepError when a rank is lost."""
        return self._prepared().advance()

    def switch(self) -> None:
        """The new placement is live on this rank, whose group is that of the plan's members now; a leaver's stays as it is.

        Only pointers and tables move. To be called on all members between the same two steps.
        """
        swap = self._prepared()
        if not swap.is_complete:
            raise EngineStateError("not all experts have come: call advance until it says so")
        self._before = (self.exchange.placed, self.exchange.rank, self.exchange.size)
        members = swap.plan.members
        if swap.rank in members:
            swap.switch()
            self.exchange.adopt(swap.plan.placed(), rank=members.index(swap.rank), size=len(members))
            self.on_changed()

    def revert(self) -> None:
        """Undo `switch`: the old placement and group ranks are live again. EngineStateError after `drop`."""
        swap, before = self._prepared(), self._before
        if before is None:
            raise EngineStateError("the placement was not switched")
        if swap.rank in swap.plan.members:
            swap.revert()
            self.exchange.adopt(before[0], rank=before[1], size=before[2])
            self.on_changed()
        self._before = None

    def drop(self) -> None:
        """Free what is not live, and forget the change: before `switch` it is undone, afterwards done for good. Idempotent."""
        if self._swap is not None:
            self._received_bytes += self._swap.received_bytes
            self._swap.drop()
        self._swap = self._before = None

    def _prepared(self) -> ExpertSwap:
        if self._swap is None:
            raise EngineStateError("no change of the experts' placement is prepared")
        return self._swap

    def _held(self) -> dict[int, list[int]]:
        return {layer: list(state.slots.held) for layer, state in self.exchange.layers.items()}

    # -- for clients ----------------------------------------------------------------------------------------------------------

    def rpc_methods(self) -> Mapping[str, Callable[..., Any]]:
        """What `collective_rpc` may call by name."""
        return {
            "expert_load": self.expert_load,
            "expert_placement": self.expert_placement,
            "expert_traffic": self.expert_traffic,
            "rebalance_experts": self.rebalance_experts,
        }

    def expert_load(self, reset: bool = False) -> dict[str, list[int]]:
        """By layer: how many tokens of this rank's requests each expert was chosen for, since the start or the last reset.

        The sum over all ranks is what a planner of placements wants. With CUDA graphs the padding of a step is counted too.
        """
        load = {str(layer): counts for layer, counts in self.exchange.load().items()}
        if reset:
            self.exchange.reset_load()
        return load

    def expert_placement(self) -> dict[str, list[list[int]]]:
        """By layer: the experts of each group rank, by slot; -1 is an empty one."""
        return {str(layer): [list(row) for row in placed.rows] for layer, placed in self.exchange.placed.items()}

    def expert_traffic(self) -> dict[str, int]:
        """What was exchanged since the start.

        `sent_rows`: (token, expert) rows that others computed for this rank; `sent_bytes`: what it sent, results for others included;
        `moved_bytes`: experts that it received; `is_rebalancing`: 1 while more of them are on their way.
        """
        under_way = self._rebalance.received_bytes if self._rebalance is not None else 0
        return {
            "sent_rows": self.exchange.sent_rows,
            "sent_bytes": self.exchange.sent_bytes,
            "moved_bytes": self._received_bytes + under_way,
            "is_rebalancing": int(self._rebalance is not None),
        }

    def rebalance_experts(
        self, placement: Mapping[str, Sequence[Sequence[int]]], shares: Mapping[str, Any] | None = None, bytes_per_step: int = 16 << 20
    ) -> int:
        """Move to another placement of the same ranks while serving; the number by which the ranks know this change.

        To be asked of all ranks: it begins at the step in which all of them know, and goes on layer by layer with at most `bytes_per_step`
        sent and received by each rank in a step. `placement` as `expert_placement` gives it; `shares` likewise, parts of 1.
        """
        if self.exchange.is_alone:
            raise NotSupportedError("rebalance_experts: one rank holds all experts")
        if self._swap is not None or self._rebalance is not None:
            raise EngineStateError("rebalance_experts: another change of the experts' placement is under way")
        if bytes_per_step < 1:
            raise InvalidArgumentsError(f"bytes_per_step must be at least 1, not {bytes_per_step!r}")
        try:
            placed = given_map(placement, self._found.experts, self.exchange.size, shares)
        except ConfigurationError as error:
            raise InvalidArgumentsError(f"rebalance_experts: {error}") from error
        self._rebalance = Rebalance(self.exchange, placed, bytes_per_step)
        return self._rebalance.number
