"""AdamW, with a weight decay that knows what to spare."""
import torch


def matrices(model):
    """The parameters that --weight-decay shrinks: those called weight or W (in_proj_weight, W_down), if they have two
    axes or more and are no embedding and no norm. As in the code of Mamba and S4, A is spared, and so is DiffuSSM's dt:
    frequencies would go to 0, and dt to 1. (DiS computes its dt from the tokens, by a matrix that does decay.)"""
    spared = torch.nn.Embedding, torch.nn.LayerNorm, torch.nn.RMSNorm
    return list({p for module in model.modules() if not isinstance(module, spared)
                 for name, p in module.named_parameters(recurse=False)
                 if p.requires_grad and p.ndim > 1 and ("weight" in name or name.startswith("W"))})


class AdamW(torch.optim.AdamW):
    """PyTorch's, but only the `matrices` of the model decay. All parameters stay in one group: two groups would change
    their numbers, by which a checkpoint knows their moments."""

    def __init__(self, model, weight_decay, **options):
        super().__init__(model.parameters(), weight_decay=0, **options)
        self.weight_decay, self.matrices = weight_decay, matrices(model) if weight_decay else []

    @torch.no_grad()
    def step(self):
        """w <- (1 - lr weight_decay) w, for the matrices that have a gradient; then Adam's step."""
        if weights := [w for w in self.matrices if w.grad is not None]:
            torch._foreach_mul_(weights, 1 - self.param_groups[0]["lr"] * self.weight_decay)
        super().step()
