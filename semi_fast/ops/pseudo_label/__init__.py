"""SeMi's pseudo-labels: prototypes mixed into the prediction, both targets, masks and the hardness weight."""

from semi_fast.ops.pseudo_label.reference import PseudoLabels, hardness_weight, prototype_probs, pseudo_label

__all__ = ["PseudoLabels", "hardness_weight", "prototype_probs", "pseudo_label"]
