"""Prune a checkpoint of timm's train.py, and hand back one that timm's validate.py opens.

    python examples/timm_checkpoint.py output/train/RUN/model_best.pth.tar --data DATA

All MLPs keep the same share of their neurons, so that timm can build the result by `mlp_ratio`.
Models of other plans are saved by `vp.save` and opened by `vp.load`.
"""

import argparse

import timm
import torch

import vitprune_fast as vp

parser = argparse.ArgumentParser()
parser.add_argument("checkpoint")
parser.add_argument("--data", required=True, help="folder with train/CLASS and val/CLASS")
parser.add_argument("--keep", type=float, default=0.5, help="share of the neurons that stay")
parser.add_argument("--images", type=int, default=1024, help="training images to score on")
parser.add_argument("--out", default="pruned.pth.tar")
options = parser.parse_args()

# what train.py was called with lies in the file as well; nothing else is unpickled
with torch.serialization.safe_globals([argparse.Namespace]):
    saved = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
made = saved["args"]
kwargs = {"num_classes": made.num_classes, **(made.model_kwargs or {})}
model = timm.create_model(made.model, **kwargs).eval()
model.load_state_dict(saved.get("state_dict_ema") or saved["state_dict"])

channels, *size = vp.describe(model).input_size
data = vp.open_data(f"folder:{options.data}", image_size=tuple(size), channels=channels)
train, batch = data.split("train"), 32
loader = vp.Loader(train, batch, workers=0)
some = [each for _, each in zip(range(-(-options.images // batch)), loader, strict=False)]

scores = vp.score(model, some, units=("neuron",))
budget = vp.Budget(keep={"neuron": options.keep})
small = vp.prune(model, vp.plan(model, scores, budget, allocation="uniform"), calibration=some)

first = next(module for name, module in small.named_modules() if name.endswith("mlp.fc1"))
kwargs["mlp_ratio"] = first.out_features / first.in_features
args = argparse.Namespace(**{**vars(made), "model_kwargs": kwargs})
torch.save({"arch": made.model, "state_dict": small.state_dict(), "args": args}, options.out)
print(f"{vp.cost(model).macs:,} -> {vp.cost(small).macs:,} multiply-accumulates; now")
words = " ".join(f"{name}={value}" for name, value in kwargs.items())
print(f"python validate.py {options.data} --model {made.model} --checkpoint {options.out} ", end="")
print(f"--model-kwargs {words}")
