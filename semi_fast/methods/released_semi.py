"""SeMi as its released code computes it, for ablation: what it does otherwise than its paper says, and slow.

Source: the description of the released snapshot in the project's specification, 2.1 to 2.9.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import Tensor

from semi_fast import processes
from semi_fast.batch import Outputs, RowLayout, Rows, split_rows
from semi_fast.methods import memory_bank
from semi_fast.methods.base import Environment, Loss, State, class_prior, log_power
from semi_fast.methods.semi import SeMi, offered
from semi_fast.ops.masked_cross_entropy import masked_cross_entropy
from semi_fast.schema.semi import ReleasedSemiConfig, SemiConfig


class ReleasedSeMi:
    """SeMi on features out of order, with another bank, another prior and mixed rows that do not sum to 1."""

    def __init__(self, options: ReleasedSemiConfig, *, epoch_steps: int):
        self.epoch_steps = epoch_steps
        # mixing rises by the steps of an epoch where the paper divides by the epochs: as if there were so many
        same = SemiConfig(**asdict(options), mixing_renormalize=False)
        self.semi = SeMi(same, steps=epoch_steps**2, epoch_steps=epoch_steps, seed=0)
        self.needs, self.predicts = self.semi.needs, self.semi.predicts

    def init(self, env: Environment) -> State:
        if processes.count() > 1:
            raise ValueError(
                f"method.name released_semi runs in one process, as the released code does; got {processes.count()}"
            )
        if env.features != 128:
            raise ValueError(
                "method.name released_semi needs a network of 128 features, as the released code does; "
                f"model.name gives {env.features}"
            )
        counts = env.first_visit_counts  # one pass whose last batch is dropped
        if min(counts) == 0:
            raise ValueError(
                "method.name released_semi counts no image of a class in the full batches of its first pass, where the "
                f"released code stops; got {list(counts)}: use another seed"
            )
        state = self.semi.init(replace(env, labeled_counts=counts))
        state["adjustment"] = log_power(class_prior(counts, env.device), self.semi.options.adjustment)  # in float64
        state["label_share"].fill_(1)
        return state

    def loss(self, state: State, rows: Rows, outputs: Outputs, step: Tensor) -> Loss:
        mixed_up = outputs._replace(features=scrambled(outputs.features, rows.layout))
        found = self.semi.loss_of(state, rows, mixed_up, step, capacity_prototypes(state))
        labeled = split_rows(outputs.logits[self.predicts], rows.layout).labeled
        exact = masked_cross_entropy(labeled.double(), rows.labels, offset=state["adjustment"]).float()
        terms = found.terms | {"balanced_supervised": exact}
        return found._replace(total=torch.stack(list(terms.values())).sum(), terms=terms)

    def update(self, state: State, pending: State, step: Tensor) -> None:
        self.semi.count_labels(state, pending, step)
        features, label, confidence, mask = offered(pending)
        push(state, features, label, confidence, mask, step)
        self.decay(state, step, rows=len(features))
        sort_by_confidence(state)
        self.semi.move_center(state, pending, step)

    def decay(self, state: State, step: Tensor, *, rows: int) -> None:
        """Lower what was not stored since the last decay, in every n-th step of an epoch."""
        every = self.semi.options.bank_decay_every
        clock = step % self.epoch_steps + 1
        since = every + torch.where(clock == every, self.epoch_steps % every, 0)  # steps since the last decay
        lowered = (clock % every == 0) & (state["bank.inserted"] < (step + 1 - since) * rows)
        beta = state["bank.confidences"].new_full((), self.semi.options.bank_decay)
        memory_bank.decay(state, torch.where(lowered, beta, 1.0))

    def logits(self, state: State, outputs: Outputs) -> Tensor:
        return outputs.logits[self.predicts]


def capacity_prototypes(state: State) -> tuple[Tensor, Tensor]:
    """(each class's sum over M, empty slots counted as zeros [C, D]; bool [C], all true)."""
    slots = state["bank.features"].shape[1]
    means = (state["bank.sums"] / slots).to(state["bank.features"].dtype)
    return means, torch.ones_like(means[:, 0], dtype=torch.bool)


def scrambled(features: Tensor, layout: RowLayout) -> Tensor:
    """[N, D]: interleaved in groups of 4 for the network and not put back; place B * b + a holds row 4 * a + b."""
    if not layout.labeled == layout.unlabeled == len(features) // 4:
        raise ValueError(f"released_semi needs B = U and 2 strong views; got {layout}")
    return features.view(layout.labeled, 4, -1).transpose(0, 1).reshape(len(features), -1)


def push(state: State, features: Tensor, labels: Tensor, confidences: Tensor, mask: Tensor, step: Tensor) -> None:
    """Offer R rows one by one, in place; classes stay sorted by confidence.

    A row above the lowest confidence of its class replaces that confidence, but of the features the first row, that of
    the highest confidence, is dropped; the new row then goes to the place of its confidence in both. So confidences
    are the M highest, and features are not theirs. A loop over rows: slow, and only here.
    """
    stored, inserted = state["bank.confidences"], state["bank.inserted"]
    (classes, slots), rows = stored.shape, len(labels)
    place = torch.arange(slots, device=labels.device)
    number = memory_bank.numbers(step, rows)
    held = place.repeat(classes, 1)  # [C, M]: which of (M slots, R rows) a place of the features shows
    for r in range(rows):
        k = labels[r : r + 1]
        confidence = confidences[r].to(stored.dtype)
        mine, age, shows = (x.index_select(0, k)[0] for x in (stored, inserted, held))
        at = (mine[:-1] >= confidence).sum()
        accepted = mask[r] & (confidence > mine[-1])

        def insert(old: Tensor, new: Tensor | int, shift: int, at: Tensor = at, accepted: Tensor = accepted) -> Tensor:
            moved = torch.where(place < at, old if shift == 1 else old.roll(-1), old.roll(1) if shift == 1 else old)
            return torch.where(accepted, torch.where(place == at, new, moved), old).unsqueeze(0)

        stored.index_copy_(0, k, insert(mine, confidence, 1))
        inserted.index_copy_(0, k, insert(age, number[r], 1))
        held.index_copy_(0, k, insert(shows, slots + r, -1))
    old = rearranged(state["bank.features"], held.clamp_max(slots - 1))
    new = features.to(old.dtype)[(held - slots).clamp_min(0)]
    hold(state, torch.where((held < slots).unsqueeze(2), old, new))


def sort_by_confidence(state: State) -> None:
    """Sort every class by falling confidence, features along with it, in place: what follows a decay."""
    order = state["bank.confidences"].argsort(dim=1, descending=True, stable=True)
    for name in ("bank.confidences", "bank.inserted"):
        state[name].copy_(state[name].gather(1, order))
    hold(state, rearranged(state["bank.features"], order))


def rearranged(features: Tensor, order: Tensor) -> Tensor:
    """features [C, M, D] with the slots of each class in `order`, int64 [C, M]."""
    return features.gather(1, order.unsqueeze(2).expand_as(features))


def hold(state: State, features: Tensor) -> None:
    """Put `features` into the bank, and their sums."""
    state["bank.features"].copy_(features)
    state["bank.sums"].copy_(features.double().sum(1))
