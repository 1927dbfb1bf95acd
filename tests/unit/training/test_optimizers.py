"""Which parameters each optimizer has, and its constants."""

import pytest
import torch
from torch import nn

from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.training import TrainingSettings
from dalle_pytorch.training.optimizers import AdamW, Muon, make_optimizers
from dalle_pytorch.training.tasks.base import SharedRows
from dalle_pytorch.vae.discrete import DiscreteVAE

TRANSFORMER_MATRICES = ("to_qkv.weight", "to_out.weight", "proj_in.weight", "proj_out.weight")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def make_options(tmp_path, **settings):
    return TrainingSettings(
        output_dir=tmp_path, steps=10, batch_size=4, learning_rate=2e-3, weight_decay=0.3, **settings
    )


def names(module, parameters):
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    return sorted(known[id(parameter)] for parameter in parameters)


def test_vectors_and_numbers_have_no_weight_decay(tmp_path):
    module = Small()
    (adamw,) = make_optimizers(module, make_options(tmp_path))
    assert type(adamw) is AdamW
    decay = {group["weight_decay"]: names(module, group["params"]) for group in adamw.param_groups}
    assert decay == {
        0.3: ["conv.weight", "embedding.weight", "linear.weight"],
        0.0: ["conv.bias", "linear.bias", "norm.bias", "norm.weight", "temperature"],
    }


def test_constants_of_adamw(tmp_path):
    """The second beta is 0.98, as for transformers since arXiv:1706.03762; torch's own is 0.999."""
    (adamw,) = make_optimizers(Small(), make_options(tmp_path))
    for group in adamw.param_groups:
        assert group["betas"] == (0.9, 0.98) and group["lr"] == 2e-3


@pytest.mark.parametrize("settings", [{}, {"rotary_emb": False, "qk_norm": True}])
def test_muon_has_the_transformers_matrices_and_nothing_else(tmp_path, settings):
    vae = DiscreteVAE(image_size=16, num_tokens=40, codebook_dim=4, num_layers=2, hidden_dim=4)
    dalle = DALLE(vae=vae, dim=16, num_text_tokens=30, text_seq_len=4, depth=2, heads=1, dim_head=16, **settings)
    adamw, muon = make_optimizers(dalle, make_options(tmp_path, muon=True))
    trained = [name for name, parameter in dalle.named_parameters() if parameter.requires_grad]
    matrices = [name for name in trained if name.startswith("transformer.") and name.endswith(TRANSFORMER_MATRICES)]
    assert len(matrices) == 2 * 4
    assert names(dalle, muon.param_groups[0]["params"]) == sorted(matrices)
    assert muon.param_groups[0]["weight_decay"] == 0.3
    rest = [parameter for group in adamw.param_groups for parameter in group["params"]]
    assert names(dalle, rest) == sorted(set(trained) - set(matrices))


def test_muon_on_a_cpu_takes_torchs_steps_without_bfloat16(monkeypatch):
    """torch's Muon iterates in bfloat16, to some two digits."""
    shapes = (6, 6), (6, 24), (24, 6)
    starts = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    moved = []
    for optimizer in (Muon, torch.optim.Muon):
        matrices = [nn.Parameter(start.clone()) for start in starts]
        muon = optimizer(matrices, lr=0.1, weight_decay=0.3)
        muon.param_groups[0]["adjust_lr_fn"] = "match_rms_adamw"
        grads = torch.Generator().manual_seed(1)
        with monkeypatch.context() as patch:
            if optimizer is Muon:
                patch.setattr(torch.Tensor, "bfloat16", lambda tensor: pytest.fail("bfloat16 on a CPU"))
            for _ in range(3):
                for matrix in matrices:
                    matrix.grad = torch.randn(matrix.shape, generator=grads)
                muon.step()
        assert muon.state_dict()["state"][2]["momentum_buffer"].shape == (24, 6)
        moved.append([matrix.detach() - start for matrix, start in zip(matrices, starts, strict=True)])
    for ours, theirs in zip(*moved, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_muon_passes_by_what_has_no_gradient():
    matrices = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))]
    muon = Muon(matrices, lr=0.1, weight_decay=0.0)
    matrices[0].grad = torch.eye(3)
    muon.step()
    assert (matrices[1] == 1).all() and not (matrices[0] == 1).all()


def test_rows_of_like_features_move_as_if_a_matrix_of_features_were_trained():
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    shared, plain = (nn.Parameter(torch.zeros(7, 2)) for _ in range(2))
    matrix = nn.Parameter(torch.zeros(3, 2))  # the same by hand: plain[-5:] + features @ matrix
    ours = AdamW([{"params": [shared], "weight_decay": 0.0}], 0.1, [SharedRows(shared, features)])
    theirs = torch.optim.AdamW([plain, matrix], lr=0.1, betas=(0.9, 0.98), weight_decay=0.0)
    grads = torch.Generator().manual_seed(1)
    for _ in range(4):
        grad = torch.randn(7, 2, generator=grads)
        shared.grad, plain.grad, matrix.grad = grad, grad.clone(), features.T @ grad[2:]
        ours.step()
        theirs.step()
    assert torch.equal(shared[:2], plain[:2])
    torch.testing.assert_close(shared[2:], plain[2:] + features @ matrix)
    shared.grad = None
    before = shared.detach().clone()
    ours.step()
    assert torch.equal(shared, before)


def test_moments_of_shared_rows_are_kept_with_the_others():
    features, weight = torch.eye(3), nn.Parameter(torch.ones(3, 2))
    optimizers = [AdamW([{"params": [weight]}], 0.1, [SharedRows(weight, features)]) for _ in range(2)]
    weight.grad = torch.ones(3, 2)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    moved = []
    for optimizer in optimizers:
        start = weight.detach().clone()
        optimizer.step()
        moved.append(weight.detach() - start)
        weight.data.copy_(start)
    assert torch.equal(*moved)
