"""Small networks as people write them: detection, language, sound, diffusion, graphs, tables, agents, preferences.

Those of transformers and torchvision are theirs, with random weights and small configurations. The others are written
here by hand, as the package or paper has them; each says which.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Losses = Callable[[nn.Module], Tensor]


def retinanet() -> tuple[nn.Module, Losses]:
    """torchvision's heads and losses, on three levels of a small backbone: each head runs once a level."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    class Backbone(nn.Module):
        out_channels = 16

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
            self.down = nn.ModuleList(nn.Conv2d(16, 16, 3, 2, 1) for _ in range(2))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.stem(x)
            second = self.down[0](x)
            return {"0": x, "1": second, "2": self.down[1](F.relu(second))}

    anchors = AnchorGenerator(((16,), (32,), (48,)), ((0.5, 1.0, 2.0),) * 3)
    model = RetinaNet(Backbone(), 4, anchor_generator=anchors, min_size=64, max_size=64)

    def loss(network: nn.Module) -> Tensor:
        boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
        targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in range(2)]
        return sum(network([torch.rand(3, 64, 64), torch.rand(3, 60, 64)], targets).values())

    return model, loss


def detr() -> tuple[nn.Module, Losses]:
    """The encoder and decoder of transformers, on a small backbone of its own."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        backbone=None,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_queries=5,
        num_labels=3,
        auxiliary_loss=False,
    )

    def loss(network: nn.Module) -> Tensor:
        output = network(torch.rand(2, 3, 64, 64))
        return output.logits.square().mean() + output.pred_boxes.mean()

    return DetrForObjectDetection(config), loss


class _Convolution(nn.Module):
    """The `Conv` of ultralytics: one SiLU object for all of them, as its `default_act`."""

    default_act = nn.SiLU()

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = self.default_act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class _C2f(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.hidden = outputs // 2
        self.cv1 = _Convolution(inputs, outputs)
        self.cv2 = _Convolution(3 * self.hidden, outputs)
        self.m = nn.ModuleList([nn.Sequential(_Convolution(self.hidden, self.hidden, 3))])

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(part(parts[-1]) for part in self.m)
        return self.cv2(torch.cat(parts, 1))


class _SPPF(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = _Convolution(channels, channels // 2)
        self.cv2 = _Convolution(channels * 2, channels)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class _Detect(nn.Module):
    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.cv2 = nn.ModuleList(nn.Sequential(_Convolution(c, 8, 3), nn.Conv2d(8, 16, 1)) for c in channels)
        self.cv3 = nn.ModuleList(nn.Sequential(_Convolution(c, 8, 3), nn.Conv2d(8, 3, 1)) for c in channels)

    def forward(self, levels: list[Tensor]) -> Tensor:
        found = [torch.cat((box(x), score(x)), 1) for x, box, score in zip(levels, self.cv2, self.cv3, strict=True)]
        joined = torch.cat([each.flatten(2) for each in found], 2)
        boxes, scores = joined.split((16, 3), 1)
        return torch.cat((boxes, scores.sigmoid()), 1)


class _Yolo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList(
            [
                _Convolution(3, 8, 3, 2),
                _Convolution(8, 16, 3, 2),
                _C2f(16, 16),
                _Convolution(16, 32, 3, 2),
                _SPPF(32),
                nn.Upsample(scale_factor=2),
                _C2f(48, 16),
                _Detect((16, 32)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        early = self.model[2](self.model[1](self.model[0](x)))
        deep = self.model[4](self.model[3](early))
        fused = self.model[6](torch.cat([self.model[5](deep), early], 1))
        return self.model[7]([fused, deep])


def yolo() -> tuple[nn.Module, Losses]:
    """As ultralytics writes it: every convolution calls one SiLU object."""
    return _Yolo(), lambda network: network(torch.rand(2, 3, 32, 32)).square().mean()


def _language(name: str, **config: Any) -> Callable[[], tuple[nn.Module, Losses]]:
    def build() -> tuple[nn.Module, Losses]:
        import transformers

        made = getattr(transformers, f"{name}Config")(
            vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager", **config
        )
        model = getattr(transformers, f"{name}ForCausalLM")(made)
        ids = torch.randint(3, 64, (2, 7))
        return model, lambda network: network(input_ids=ids, labels=ids).loss

    return build


_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
llama = _language("Llama", **_SMALL)
gemma2 = _language("Gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=4, **_SMALL)
mixtral = _language("Mixtral", num_local_experts=3, num_experts_per_tok=2, **_SMALL)
mamba = _language("Mamba", hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4)


def bert() -> tuple[nn.Module, Losses]:
    """With its masked-language head: the tied decoder reads the transform's GELU."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    ids = torch.randint(3, 64, (2, 7))
    return BertForMaskedLM(config), lambda network: network(input_ids=ids, labels=ids).loss


def t5() -> tuple[nn.Module, Losses]:
    """Encoder and decoder, with ReLU feed-forward layers."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    ids = torch.randint(3, 64, (2, 7))
    return T5ForConditionalGeneration(config), lambda network: network(input_ids=ids, labels=ids).loss


def whisper() -> tuple[nn.Module, Losses]:
    """Two convolutions with GELU, then encoder and decoder."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=10,
        max_target_positions=16,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    ids = torch.randint(3, 64, (2, 7))
    sound = torch.rand(2, 8, 20)
    return WhisperForConditionalGeneration(config), lambda network: network(input_features=sound, labels=ids).loss


def clip() -> tuple[nn.Module, Losses]:
    """Two towers, and a loss over all pairs."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=dict(vocab_size=64, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, **tower),
        vision_config=dict(image_size=16, patch_size=8, **tower),
        projection_dim=12,
    )
    ids = torch.randint(3, 64, (2, 7))
    pictures = torch.rand(2, 3, 16, 16)
    return CLIPModel(config), lambda network: network(input_ids=ids, pixel_values=pictures, return_loss=True).loss


def _time_features(time: Tensor, width: int) -> Tensor:
    rates = torch.exp(-math.log(1000) * torch.arange(width // 2) / (width // 2))
    angles = time[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


class _ResnetBlock(nn.Module):
    """The `ResnetBlock2D` of diffusers: one SiLU for both norms and for the time."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(4, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(self.nonlinearity(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(self.nonlinearity(time))[:, :, None, None]
        hidden = self.conv2(self.nonlinearity(self.norm2(hidden)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class _SpatialAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(4, channels)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = self.group_norm(x).view(batch, channels, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(self.to_q(rows), self.to_k(rows), self.to_v(rows))
        return x + self.to_out(mixed).transpose(1, 2).reshape(batch, channels, height, width)


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down = _ResnetBlock(8, 16, 16)
        self.downsample = nn.Conv2d(16, 16, 3, 2, 1)
        self.mid = _ResnetBlock(16, 16, 16)
        self.attention = _SpatialAttention(16)
        self.up = _ResnetBlock(32, 8, 16)
        self.conv_norm_out = nn.GroupNorm(4, 8)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = self.time_embedding(_time_features(time, 8))
        skip = self.down(self.conv_in(x), time)
        deep = self.attention(self.mid(self.downsample(skip), time))
        joined = torch.cat([F.interpolate(deep, scale_factor=2.0), skip], 1)
        return self.conv_out(self.conv_act(self.conv_norm_out(self.up(joined, time))))


def unet() -> tuple[nn.Module, Losses]:
    """As the one of diffusers: residual blocks with the time added, attention, skips that are concatenated."""
    return _UNet(), lambda network: F.mse_loss(
        network(torch.rand(2, 3, 8, 8), torch.tensor([1.0, 50.0])), torch.rand(2, 3, 8, 8)
    )


class _DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.fc1, self.act, self.fc2 = (
            nn.Linear(width, 2 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(2 * width, width),
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        hidden = self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
        batch, length, width = hidden.shape
        q, k, v = self.qkv(hidden).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        hidden = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + gate1.unsqueeze(1) * self.proj(hidden)
        hidden = self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
        return x + gate2.unsqueeze(1) * self.fc2(self.act(self.fc1(hidden)))


class _DiT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(3, 16, 2, 2)
        self.t_embedder = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.y_embedder = nn.Embedding(4, 16)
        self.blocks = nn.ModuleList(_DiTBlock(16, 2) for _ in range(2))
        self.final = nn.Linear(16, 12)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(_time_features(time, 8)) + self.y_embedder(label)
        for block in self.blocks:
            x = block(x, c)
        return self.final(x)


def dit() -> tuple[nn.Module, Losses]:
    """As its authors write it: the condition's SiLU is in each block, the modulation is read by chunks."""
    label = torch.tensor([0, 3])
    return _DiT(), lambda network: network(torch.rand(2, 3, 8, 8), torch.tensor([1.0, 50.0]), label).square().mean()


class _GIN(nn.Module):
    """A layer of PyG's GIN: messages are gathered along the edges and added up at their targets."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)
        self.nn = nn.Sequential(nn.Linear(outputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = self.lin(x)
        messages = F.relu(x.index_select(0, edges[0]))
        index = edges[1].unsqueeze(-1).expand_as(messages)
        total = torch.zeros_like(x).scatter_add_(0, index, messages)
        return self.nn(x + total)


class _GraphNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = _GIN(4, 8), _GIN(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        x = F.elu(self.conv1(x, edges))
        x = F.elu(self.conv2(x, edges))
        pooled = torch.zeros(2, 8).index_add(0, graph, x)
        return self.head(F.relu(pooled))


def graph_network() -> tuple[nn.Module, Losses]:
    """Two layers of message passing, and the nodes of each graph added up."""
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 0, 4, 5, 3]])
    graph = torch.tensor([0, 0, 0, 1, 1, 1])
    return _GraphNetwork(), lambda network: network(torch.rand(6, 4), edges, graph).square().mean()


class _GatedLayer(nn.Module):
    """The `GLU_Layer` of pytorch-tabnet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.output_dim = outputs
        self.fc = nn.Linear(inputs, 2 * outputs, bias=False)
        self.bn = nn.BatchNorm1d(2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.fc(x))
        return torch.mul(x[:, : self.output_dim], torch.sigmoid(x[:, self.output_dim :]))


class _TabNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(6)
        self.shared = _GatedLayer(6, 8)
        self.steps = nn.ModuleList(_GatedLayer(8, 8) for _ in range(2))
        self.attentive = nn.ModuleList(nn.Linear(4, 6) for _ in range(2))
        self.final = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        prior, decision, attention = torch.ones_like(x), torch.zeros(len(x), 4), torch.zeros(len(x), 4)
        for step, attentive in zip(self.steps, self.attentive, strict=True):
            mask = torch.softmax(attentive(attention) * prior, -1)
            prior = prior * (1.3 - mask)
            hidden = self.shared(mask * x)
            hidden = (hidden + step(hidden)) * math.sqrt(0.5)
            decision = decision + F.relu(hidden[:, :4])
            attention = hidden[:, 4:]
        return self.final(decision)


def tabnet() -> tuple[nn.Module, Losses]:
    """Gates written by hand, a shared layer, and the ReLU of the decision half of each step."""
    return _TabNet(), lambda network: network(torch.rand(8, 6)).square().mean()


class _HandLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ih, self.hh = nn.Linear(5, 16), nn.Linear(4, 16, bias=False)
        self.rnn_in, self.rnn_hidden = nn.Linear(4, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 4)
        state = x.new_zeros(len(x), 6)
        for step in x.unbind(1):
            i, f, g, o = (self.ih(step) + self.hh(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            state = torch.tanh(self.rnn_in(h) + self.rnn_hidden(state))
        return self.out(state)


def recurrent() -> tuple[nn.Module, Losses]:
    """An LSTM cell and a plain recurrent cell written by hand, over three steps."""
    return _HandLSTM(), lambda network: network(torch.rand(2, 3, 5)).square().mean()


class _ActorCritic(nn.Module):
    """The `ActorCriticPolicy` of stable-baselines3 with a Gaussian action."""

    def __init__(self) -> None:
        super().__init__()
        self.policy_net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.value_net_body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.action_net, self.value_net = nn.Linear(8, 2), nn.Linear(8, 1)
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, observed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = self.action_net(self.policy_net(observed))
        value = self.value_net(self.value_net_body(observed))
        deviation = torch.clamp(self.log_std, -20, 2).exp()
        normal = torch.distributions.Normal(mean, deviation.expand_as(mean), validate_args=False)
        action = normal.rsample()
        return torch.tanh(action), value, normal.log_prob(action).sum(-1)


def actor_critic() -> tuple[nn.Module, Losses]:
    """A rollout without gradients, then a training pass with the clipped loss."""

    def loss(network: nn.Module) -> Tensor:
        observed = torch.rand(6, 5)
        with torch.no_grad():
            _, _, before = network(observed)
        _, value, log_prob = network(observed)
        ratio = (log_prob - before).clamp(-5, 5).exp()
        advantage = torch.rand(6)
        policy = -torch.min(advantage * ratio, advantage * ratio.clamp(0.8, 1.2)).mean()
        return policy + F.mse_loss(value.flatten(), torch.rand(6))

    return _ActorCritic(), loss


class _LoraLinear(nn.Module):
    """The `Linear` of peft: the base layer and a low-rank branch, whose sum it gives."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        return result + self.lora_B["default"](self.lora_A["default"](x)) * 2.0 if self.enabled else result


def dpo() -> tuple[nn.Module, Losses]:
    """A small Llama with low-rank branches on its MLP; the reference is the same network without them."""
    model, _ = llama()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, _LoraLinear(getattr(layer.mlp, name), 2))
    chosen, rejected = torch.randint(3, 64, (2, 7)), torch.randint(3, 64, (2, 7))

    def log_probability(network: nn.Module, ids: Tensor) -> Tensor:
        scores = network(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return scores.gather(2, ids[:, 1:, None]).squeeze(-1).sum(-1)

    def loss(network: nn.Module) -> Tensor:
        branches = [module for module in network.modules() if isinstance(module, _LoraLinear)]
        for branch in branches:
            branch.enabled = False
        with torch.no_grad():
            reference = log_probability(network, chosen) - log_probability(network, rejected)
        for branch in branches:
            branch.enabled = True
        ours = log_probability(network, chosen) - log_probability(network, rejected)
        return -F.logsigmoid(0.1 * (ours - reference)).mean()

    return model, loss


class _SparseAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(8, 32) / 8)
        self.b_enc = nn.Parameter(torch.zeros(32))
        self.W_dec = nn.Parameter(self.W_enc.detach().t().clone())
        self.b_dec = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latents = F.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        return latents @ self.W_dec + self.b_dec, latents


def sparse_autoencoder() -> tuple[nn.Module, Losses]:
    """Weights that are bare parameters, as SAELens has them."""

    def loss(network: nn.Module) -> Tensor:
        x = torch.randn(16, 8)
        output, latents = network(x)
        return F.mse_loss(output, x) + 1e-3 * latents.abs().sum(-1).mean()

    return _SparseAutoencoder(), loss


def deep_copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


CLIENTS: dict[str, Callable[[], tuple[nn.Module, Losses]]] = {
    "RetinaNet": retinanet,
    "DETR": detr,
    "YOLO": yolo,
    "Llama": llama,
    "Gemma 2": gemma2,
    "Mixtral": mixtral,
    "Mamba": mamba,
    "BERT": bert,
    "T5": t5,
    "Whisper": whisper,
    "CLIP": clip,
    "diffusion U-Net": unet,
    "DiT": dit,
    "graph network": graph_network,
    "TabNet": tabnet,
    "recurrent cells": recurrent,
    "actor-critic": actor_critic,
    "DPO with LoRA": dpo,
    "sparse autoencoder": sparse_autoencoder,
}
