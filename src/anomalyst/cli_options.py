"""Arguments and options that several commands take, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Bundle = Annotated[Path, typer.Argument(help="Bundle: a folder or .zip that `fit` wrote.")]
AnyBundle = Annotated[
    Path, typer.Argument(help="Bundle that `fit` wrote, or exported one: a folder or .zip.")
]
Data = Annotated[Path, typer.Argument(help="Data set folder; its layout is recognised.")]
Categories = Annotated[
    list[str] | None, typer.Option("--category", help="Only this category; repeatable.")
]
Layout = Annotated[
    str | None,
    typer.Option(help="Force the layout: mvtec, visa, btad, mpdd, realiad, bmad or folder."),
]
Alpha = Annotated[
    float | None,
    typer.Option(help="Share of good parts that may be called NG (default: the bundle's, 0.01)."),
]
AlphaReview = Annotated[
    float | None,
    typer.Option(help="Share of good parts that may be sent to review or NG (default: 0.05)."),
]
Training = Annotated[
    list[Path], typer.Argument(help="Data set folder, or several to learn together.")
]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Passes over the images (default: the method's).")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Training steps, instead of epochs.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint of a stopped training.")
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write TensorBoard events while training.")
]
Devices = Annotated[
    int, typer.Option(min=1, help="GPUs (or processes, on the CPU) that share the training.")
]
TrainingPrecision = Annotated[
    str, typer.Option(help="Of the training: 32-true, or bf16-mixed where it is quicker.")
]
Shots = Annotated[int | None, typer.Option(min=1, help="References a category (default: all).")]
Weights = Annotated[str | None, typer.Option(help="file:PATH of the backbone weights.")]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Short side in pixels (default: the backbone's).")
]
TileSide = Annotated[
    int | None,
    typer.Option("--tile", min=1, help="Look in tiles of this side; --image-size is of the whole."),
]
Overlap = Annotated[
    float | None, typer.Option(min=0, max=0.99, help="Least share that tiles overlap (0.25).")
]
Overview = Annotated[
    bool, typer.Option("--overview", help="Look at the whole image too, as small as a tile.")
]
Region = Annotated[
    str | None, typer.Option(metavar="X,Y,W,H", help="Look only here, in pixels of the image.")
]
Ignore = Annotated[
    Path | None, typer.Option(help="Mask image: what is above 0 counts for nothing.")
]
Align = Annotated[
    Path | None, typer.Option(help="Image of a part that lies right, to align others to.")
]
AlignOn = Annotated[
    str | None, typer.Option(metavar="X,Y,W,H", help="Patch of it to find the part by.")
]
Search = Annotated[int | None, typer.Option(min=1, help="Pixels that a part may be moved by (50).")]
Offline = Annotated[bool, typer.Option("--offline", help="Forbid downloads.")]
Preset = Annotated[str | None, typer.Option(help="A method's named settings, such as paper.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A method's option; repeatable."),
]
CalibrationShare = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share of good images held out to calibrate.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Fixes every random choice.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
CacheFolder = Annotated[
    Path | None,
    typer.Option("--feature-cache", help="Keep frozen features here, for repeated runs."),
]

EngineName = Annotated[
    Literal["plain", "ray"], typer.Option("--engine", help="This process, or a Ray cluster.")
]
Address = Annotated[
    str | None, typer.Option(help="Ray: the cluster's address (default: one on this machine).")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Ray: processes that judge (default: one a core).")
]
