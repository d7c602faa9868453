"""Procedural chest X-ray phantoms in the competition's layout, so that all steps run where no patient data may go.

A phantom is built from soft masks: body, two lungs (one in the lateral view), heart, mediastinum, ribs, vessels. A
finding is a visible sign at its anatomical place, drawn with the distances of a lung to its walls, so that one drawing
serves both views.
Nothing here is derived from images of people, and nothing trained on it knows anything about them.
"""

import csv
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from cxrdist.distributed.environment import usable_cores
from cxrdist.task import COMPETITION_LABELS as LABELS

Plane = NDArray[np.float32]  # (H, W)
Points = list[tuple[float, float]]  # phantom coordinates: x to the right, y down, the image is [-1, 1] x [-1, 1]

CSV_COLUMNS = ("Image_name", "Patient_ID", "Study", "Sex", "Age", "ViewCategory", "ViewPosition", *LABELS)
LUNG_OPACITY_PARENTS = (
    "Consolidation",
    "Edema",
    "Pneumonia",
)  # these are lung opacities too, as in CheXpert's hierarchy
# Chance that a study has the finding, before co-occurrence; each class keeps several positive patients in a 20 % split.
PREVALENCE = {
    "Atelectasis": 0.17,
    "Cardiomegaly": 0.16,
    "Consolidation": 0.13,
    "Edema": 0.13,
    "Enlarged Cardiomediastinum": 0.13,
    "Fracture": 0.13,
    "Lung Lesion": 0.13,
    "Lung Opacity": 0.05,  # on its own: ground glass without one of the parents
    "Pleural Effusion": 0.15,
    "Pleural Other": 0.13,
    "Pneumonia": 0.13,
    "Pneumothorax": 0.13,
    "Support Devices": 0.22,
}
CHRONIC = (
    "Cardiomegaly",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Pleural Other",
)  # stay over studies
PROB_HEALTHY = 0.22  # studies drawn without any finding but devices
PROB_LATERAL = 0.18


@dataclass(frozen=True)
class Study:
    """One examination: the finding labels that all its images share, and the views taken."""

    patient: int
    number: int
    sex: str
    age: int
    findings: frozenset[str]
    views: tuple[str, ...]  # ViewPosition of each image


def sample_studies(num_patients: int, seed: int) -> list[Study]:
    """Studies of `num_patients` patients (about 2.4 images a patient); a pure function of its arguments.

    A patient keeps chronic findings from study to study. Cardiomegaly and oedema bring effusions, consolidation, oedema
    and pneumonia set Lung Opacity, and No Finding excludes everything but Support Devices.
    """
    rng = np.random.default_rng([seed, 1])
    numbers = np.sort(rng.choice(np.arange(1, 40 * num_patients), num_patients, replace=False))
    return [study for patient in numbers for study in _studies_of(int(patient), np.random.default_rng([seed, patient]))]


def _studies_of(patient: int, rng: np.random.Generator) -> list[Study]:
    sex, age = ("Male", "Female")[rng.integers(2)], int(rng.integers(18, 92))
    chronic = {name for name in CHRONIC if rng.random() < PREVALENCE[name]}
    studies = []
    for number in range(1, 1 + int(rng.choice([1, 2, 3], p=[0.4, 0.35, 0.25]))):
        healthy = not chronic and rng.random() < 2 * PROB_HEALTHY
        findings = set(chronic)
        if not healthy:
            findings |= {name for name in PREVALENCE if name not in CHRONIC and rng.random() < PREVALENCE[name]}
            if findings & {"Cardiomegaly", "Edema"} and rng.random() < 0.2:
                findings.add("Pleural Effusion")
            if findings & set(LUNG_OPACITY_PARENTS):
                findings.add("Lung Opacity")
        if rng.random() < PREVALENCE["Support Devices"] + 0.15 * ("Pneumothorax" in findings):
            findings.add("Support Devices")
        if not findings - {"Support Devices"}:
            findings.add("No Finding")
        views = ["AP" if "Support Devices" in findings else "PA"]
        if rng.random() < 0.36:
            views.append("PA" if rng.random() < 0.4 else "Lateral")
        studies.append(Study(patient, number, sex, age + number // 3, frozenset(findings), tuple(views)))
    return studies


def image_name(study: Study, image: int) -> str:
    """`PPPPPPPP_SSS_III.jpg` of image `image` (from 0) of a study; numbered from 001 as in the competition."""
    return f"{study.patient:08d}_{study.number:03d}_{image + 1:03d}.jpg"


def write_division(
    images: Path, csv_path: Path, *, num_patients: int = 250, seed: int = 0, workers: int | None = None
) -> int:
    """Render every image of `sample_studies` into `images` (grey JPEG), write the label CSV, return the image count.

    Images that are already there are kept: each appears under its name only when complete. The bytes depend on
    (num_patients, seed) alone, not on `workers` (default: the cores there are).
    """
    studies = sample_studies(num_patients, seed)
    images.mkdir(parents=True, exist_ok=True)
    jobs = [(study, image) for study in studies for image in range(len(study.views))]
    draw = partial(_write_image, images, seed)
    with ProcessPoolExecutor(workers or usable_cores()) as pool:
        for _ in tqdm(pool.map(draw, jobs, chunksize=8), total=len(jobs), desc="drawing phantoms", unit="image"):
            pass
    part = csv_path.with_name(csv_path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for study, image in jobs:
            view = study.views[image]
            category = "Lateral" if view == "Lateral" else "Frontal"
            cells = (image_name(study, image), study.patient, study.number, study.sex, study.age, category, view)
            writer.writerow([*cells, *(int(label in study.findings) for label in LABELS)])
    os.replace(part, csv_path)
    return len(jobs)


def _write_image(folder: Path, seed: int, job: tuple[Study, int]) -> None:
    study, image = job
    path = folder / image_name(study, image)
    if not path.exists():
        part = path.with_name(path.name + ".part")
        Image.fromarray(render(study, image, seed)).save(part, "JPEG", quality=90)
        os.replace(part, path)


@dataclass
class Frame:
    """The pixel grid of one exposure under a small pose change, and strokes drawn in phantom coordinates."""

    width: int
    height: int
    matrix: NDArray[np.float64]  # (2, 3): phantom coordinates -> pixels
    x: Plane = field(init=False)
    y: Plane = field(init=False)

    def __post_init__(self) -> None:
        inverse = np.linalg.inv(self.matrix[:, :2])
        columns = np.arange(self.width, dtype=np.float32)[None, :] - np.float32(self.matrix[0, 2])
        rows = np.arange(self.height, dtype=np.float32)[:, None] - np.float32(self.matrix[1, 2])
        a, b, c, d = (np.float32(value) for value in inverse.ravel())
        self.x = a * columns + b * rows
        self.y = c * columns + d * rows

    @property
    def px(self) -> float:
        """Pixels in one unit of phantom length."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))

    def pixels(self, points: Points) -> Points:
        """Phantom points as pixel positions."""
        mapped = np.asarray(points) @ self.matrix[:, :2].T + self.matrix[:, 2]
        return [(float(px), float(py)) for px, py in mapped]


class Layer:
    """Lines and shapes on a transparent plane, drawn with Pillow and softened once at the end."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.image = Image.new("L", (frame.width, frame.height))
        self.pen = ImageDraw.Draw(self.image)

    def stroke(self, points: Points, width: float, value: float = 1.0) -> None:
        """A polyline of `width` (phantom units, at least 1 px) with round joints; value in [0, 1]."""
        size = max(round(width * self.frame.px), 1)
        self.pen.line(self.frame.pixels(points), fill=round(255 * value), width=size, joint="curve")

    def blob(self, center: tuple[float, float], radius: float, value: float = 1.0, outline: float = 0.0) -> None:
        """A disc, or a ring when `outline` (its width) is given."""
        ((px, py),) = self.frame.pixels([center])
        size = radius * self.frame.px
        box, fill = (px - size, py - size, px + size, py + size), round(255 * value)
        if outline:
            self.pen.ellipse(box, outline=fill, width=max(round(outline * self.frame.px), 1))
        else:
            self.pen.ellipse(box, fill=fill)

    def polygon(self, points: Points, value: float = 1.0) -> None:
        """A filled polygon."""
        self.pen.polygon(self.frame.pixels(points), fill=round(255 * value))

    def plane(self, blur_px: float) -> Plane:
        """The layer in [0, 1] after a Gaussian blur."""
        blurred = self.image.filter(ImageFilter.GaussianBlur(blur_px))
        return np.asarray(blurred, dtype=np.float32) * np.float32(1 / 255)


@dataclass
class Lung:
    """One lung: its soft mask, and distances (phantom units, positive inside) to its borders."""

    mask: Plane
    wall: Plane  # to the chest wall (lateral view: to the posterior wall)
    hilum: Plane  # to the mediastinal side
    floor: Plane  # to the diaphragm
    apex: Plane  # to the top
    length: float  # from the apex to the dome of the diaphragm
    side: int  # -1: on the image's left, +1: on its right
    at: Callable[[float, float], tuple[float, float]]  # (0 hilum .. 1 wall, 0 apex .. 1 base) -> phantom point
    root: float = 0.0  # where the vessels enter, as the first argument of `at`

    opacity: Plane = field(init=False)  # 0 = air, 1 = as dense as soft tissue
    markings: Plane = field(init=False)  # 1 = vessels visible

    def __post_init__(self) -> None:
        self.opacity = np.zeros_like(self.mask)
        self.markings = self.mask.copy()

    def fill(self, opacity: Plane) -> None:
        """Add an opacity (0 to 1), where two overlap they join without exceeding 1."""
        self.opacity = 1 - (1 - self.opacity) * (1 - opacity)


def _soft(distance: NDArray[np.floating[Any]], edge: float) -> Plane:
    """0 outside, 1 inside, over a ramp `edge` wide at distance 0."""
    ramp: Plane = np.clip(distance.astype(np.float32) * np.float32(1 / edge) + np.float32(0.5), 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _gauss(frame: Frame, center: tuple[float, float], radius_x: float, radius_y: float) -> Plane:
    dx = (frame.x - np.float32(center[0])) * np.float32(1 / radius_x)
    dy = (frame.y - np.float32(center[1])) * np.float32(1 / radius_y)
    return np.asarray(np.exp(-0.5 * (dx * dx + dy * dy)), dtype=np.float32)


def _clouds(frame: Frame, rng: np.random.Generator, cells: int) -> Plane:
    """Smooth noise, mean about 0 and deviation about 1, with `cells` bumps across the image."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((frame.width, frame.height), Image.Resampling.BICUBIC))


def _curve(start: tuple[float, float], bend: tuple[float, float], end: tuple[float, float], num: int = 16) -> Points:
    """A quadratic Bezier curve as points."""
    t = np.linspace(0, 1, num)[:, None]
    points = (1 - t) ** 2 * np.array(start) + 2 * t * (1 - t) * np.array(bend) + t**2 * np.array(end)
    return [(float(px), float(py)) for px, py in points]


def render(study: Study, image: int, seed: int) -> NDArray[np.uint8]:
    """Image `image` of a study as uint8 (H, W), 600-760 px a side: bright is dense. A pure function of its arguments.

    The patient's build comes from (seed, patient), the signs from (seed, patient, study), pose, exposure and noise from
    the image, so several images of a patient resemble each other.
    """
    build = np.random.default_rng([seed, study.patient, 7])
    signs = np.random.default_rng([seed, study.patient, study.number, 8])
    pose = np.random.default_rng([seed, study.patient, study.number, image, 9])
    lateral = study.views[image] == "Lateral"
    height = int(pose.integers(620, 760))
    width = int(height * pose.uniform(0.84, 0.98 if lateral else 1.02))
    angle, zoom = np.deg2rad(pose.uniform(-3, 3)), pose.uniform(0.95, 1.03)
    turn = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shift = np.array([width, height]) * (0.5 + pose.uniform(-0.02, 0.02, 2))
    frame = Frame(width, height, np.hstack([np.diag([width / 2, height / 2]) @ turn, shift[:, None]]))
    scene = (_lateral if lateral else _frontal)(frame, study, build, signs)
    return _expose(frame, scene, pose)


@dataclass
class Scene:
    """What `_expose` turns into grey levels; planes in [0, 1] except `extra`, which adds brightness."""

    tissue: Plane  # brightness of everything that is not air, without bones and devices
    lungs: list[Lung]
    bones: Plane
    vessels: Plane
    extra: Plane


def _expose(frame: Frame, scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    image = scene.tissue + 0.24 * scene.bones + scene.extra
    for lung in scene.lungs:
        image -= (0.36 + 0.012 * _clouds(frame, rng, 60)) * lung.mask * (1 - lung.opacity)
        image += 0.15 * scene.vessels * lung.markings * (1 - 0.8 * lung.opacity)
    image += 0.015 * _clouds(frame, rng, 5)
    image = np.clip(image, 0, 1) ** np.float32(rng.uniform(0.85, 1.2))
    image = image * np.float32(rng.uniform(0.88, 1.02)) + np.float32(rng.uniform(0, 0.05))
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(0.008, 0.02))
    return np.asarray(np.clip(image * 255, 0, 255), dtype=np.uint8)


def _frontal(frame: Frame, study: Study, build: np.random.Generator, signs: np.random.Generator) -> Scene:
    x, y = frame.x, frame.y
    top, base = build.uniform(-0.76, -0.70), build.uniform(0.42, 0.56)
    chest, narrow = build.uniform(0.72, 0.80), build.uniform(0.085, 0.115)
    wide_top = signs.uniform(0.17, 0.25) if "Enlarged Cardiomediastinum" in study.findings else 0.0
    ratio = signs.uniform(0.62, 0.74) if "Cardiomegaly" in study.findings else build.uniform(0.40, 0.47)

    shoulder = _soft(y + 0.78, 0.4)
    body = _soft(0.24 + 0.72 * shoulder + 0.02 * y - np.abs(x), 0.03) * 0.60
    depth = np.clip((base - y) / (base - top), 0, 1)
    wall_x = chest * np.sqrt(1 - depth**3 * 0.97)
    arch = np.exp(-0.5 * ((y + 0.36) / 0.2) ** 2)
    lifted = int(signs.choice([-1, 1])) if "Atelectasis" in study.findings else 0
    lungs = []
    for side in (-1, 1):
        across = x * side
        inner = narrow + wide_top * arch * (1.0 if side == 1 else 0.85) + 0.02
        floor_y = base - 0.05 * (side == -1) - (0.17 if lifted == side else 0.0)
        middle = 0.5 * (narrow + chest) - 0.08
        floor = floor_y + 0.30 * np.clip((across - middle) / (chest - middle), -0.8, 1.2) ** 2 - y
        wall, hilum, apex = wall_x - across, across - inner, y - top
        mask = _soft(wall, 0.02) * _soft(hilum, 0.025) * _soft(floor, 0.02) * _soft(apex, 0.03)
        at = partial(_place, side, narrow, chest, top, base)
        lungs.append(Lung(mask, wall, hilum, floor, apex, floor_y - top, side, at))

    left, right = 1.32 * ratio * chest, 0.68 * ratio * chest
    center, half = (left - right) / 2, (left + right) / 2
    tall = 0.24 + 0.35 * (ratio - 0.43)
    cy = base - 0.02 - tall * 0.72
    tilt = (x - center) * 0.28
    heart = _soft(1 - ((x - center) / half) ** 2 - ((y - cy - tilt) / tall) ** 2, 0.12)
    knob = _gauss(frame, (0.13 + wide_top * 0.9, -0.36), 0.045, 0.06)
    for lung in lungs:
        lung.fill(np.asarray(np.maximum(0.92 * heart, np.clip(1.3 * knob, 0, 0.9)), dtype=np.float32))

    spine = _soft(0.075 - np.abs(x), 0.03) * (0.05 + 0.025 * np.sin(y * 34))
    trachea = _soft(0.038 - np.abs(x - 0.012), 0.02) * _soft(-0.34 - y, 0.05) * 0.13
    tissue = body + 0.03 * heart + spine - trachea
    if study.sex == "Female":
        low = build.uniform(0.28, 0.40)
        tissue += 0.07 * sum(_soft(1 - ((x - s * 0.46) / 0.33) ** 2 - ((y - low) / 0.26) ** 2, 0.3) for s in (-1, 1))
    if build.random() < 0.7:
        tissue -= 0.12 * _gauss(frame, (0.33, base + 0.2), 0.12, 0.07)  # gas in the stomach

    bones = Layer(frame)
    broken = _broken_ribs(study, signs)
    for side in (-1, 1):
        for rib in range(10):
            start = (side * 0.07, top + 0.02 + rib * (base - top + 0.18) / 10)
            reach = chest * float(np.sqrt(1 - 0.97 * np.clip((base - start[1] - 0.1) / (base - top), 0, 1) ** 3)) + 0.02
            end = (side * reach, start[1] + 0.16 + 0.012 * rib)
            curve = _curve(start, (side * reach * 0.72, start[1] - 0.10), end)
            _draw_rib(bones, curve, 0.036, signs if (side, rib) in broken else None)
        bones.stroke(_curve((side * 0.09, -0.60), (side * 0.36, -0.66), (side * 0.80, -0.80)), 0.045, 0.6)
    extra = np.zeros_like(x)
    if broken:
        lung = lungs[0] if next(iter(broken))[0] == -1 else lungs[1]
        spots = [lung.at(0.97, 0.12 + 0.085 * rib) for side, rib in broken]
        haze = sum(_gauss(frame, spot, 0.06, 0.05) for spot in spots)
        extra += 0.24 * np.clip(haze, 0, 1)
    extra += _draw_findings(frame, study, lungs, signs, lifted)
    if "Support Devices" in study.findings:
        extra += _devices_frontal(frame, signs, base, chest)
    marker = Layer(frame)
    _letter(marker, (-0.88, -0.88), build)
    extra += 0.35 * marker.plane(0.8)
    return Scene(tissue, lungs, bones.plane(1.6), _vessels(frame, lungs, signs, study), extra)


def _place(
    side: int, narrow: float, chest: float, top: float, base: float, out: float, down: float
) -> tuple[float, float]:
    wall = chest * float(np.sqrt(1 - 0.97 * (1 - down) ** 3))
    return side * (narrow + (wall - narrow) * out), top + (base - top) * down


def _place_lateral(front: float, back: float, top: float, base: float, out: float, down: float) -> tuple[float, float]:
    return front + (back - front) * out, top + (base - top) * down


def _lateral(frame: Frame, study: Study, build: np.random.Generator, signs: np.random.Generator) -> Scene:
    x, y = frame.x, frame.y
    top, base = build.uniform(-0.74, -0.68), build.uniform(0.46, 0.56)
    front, back = build.uniform(-0.62, -0.54), build.uniform(0.56, 0.64)
    wide_top = signs.uniform(0.55, 0.75) if "Enlarged Cardiomediastinum" in study.findings else 0.0
    big = signs.uniform(0.38, 0.46) if "Cardiomegaly" in study.findings else build.uniform(0.22, 0.26)
    lifted = int(signs.choice([-1, 1])) if "Atelectasis" in study.findings else 0

    depth = np.clip((base - y) / (base - top), 0, 1)
    bow = np.sqrt(1 - 0.85 * depth**3)
    body = _soft(x - (front - 0.16) * (0.55 + 0.45 * bow), 0.03) * _soft(back + 0.22 - x, 0.03) * 0.60
    middle = (front + back) / 2
    wall = middle + (back - middle) * bow - x
    hilum = x - (middle + (front - middle) * bow)
    floor = base - (0.15 if lifted else 0.0) + 0.34 * np.clip((x - middle + 0.1) / (back - middle), -0.5, 1.2) ** 2 - y
    apex = y - top
    mask = _soft(wall, 0.02) * _soft(hilum, 0.02) * _soft(floor, 0.02) * _soft(apex, 0.03)
    lung = Lung(mask, wall, hilum, floor, apex, base - top, 1, partial(_place_lateral, front, back, top, base), 0.5)
    cx, cy = front + 0.10 + big * 0.95, base - 0.06 - big * 0.72
    heart = _soft(1 - ((x - cx) / big) ** 2 - ((y - cy - 0.25 * (x - cx)) / (big * 0.95)) ** 2, 0.15)
    upper = wide_top * _gauss(frame, (middle - 0.18, -0.34), 0.16, 0.22)
    root = 0.45 * _gauss(frame, (middle, -0.12), 0.09, 0.10)
    lung.fill(np.asarray(1 - (1 - 0.85 * heart) * (1 - np.clip(upper * 1.2, 0, 0.9)) * (1 - root), dtype=np.float32))

    bones = Layer(frame)
    for block in range(13):  # vertebrae
        yy = -0.82 + 0.135 * block
        xx = back - 0.05 + 0.10 * float(np.cos(yy * 1.8)) - 0.08
        corners = ((-0.055, -0.052), (0.055, -0.052), (0.055, 0.052), (-0.055, 0.052))
        bones.polygon([(xx + dx, yy + dy) for dx, dy in corners], 0.45)
    broken = _broken_ribs(study, signs)
    for rib in range(9):
        start = (back + 0.04, top + 0.02 + rib * 0.125)
        end = (front + 0.06 + 0.02 * rib, start[1] + 0.34)
        curve = _curve(start, (middle + 0.1, start[1] + 0.22), end)
        _draw_rib(bones, curve, 0.03, signs if any(number == rib for _, number in broken) else None)
    bones.stroke(_curve((front - 0.03, -0.42), (front - 0.09, -0.1), (front - 0.04, 0.22)), 0.04, 0.5)
    extra = _draw_findings(frame, study, [lung], signs, lifted)
    if "Support Devices" in study.findings:
        wires = Layer(frame)
        wires.stroke(_curve((-0.02, -0.98), (0.02, -0.5), (0.0, -0.22)), 0.022)
        wires.stroke(_curve((-0.45, -0.42), (-0.1, -0.5), (cx, cy + 0.1)), 0.016)
        wires.blob((-0.52, -0.40), 0.075)
        extra += 0.6 * wires.plane(1.0)
    tissue = body + 0.06 * heart
    return Scene(tissue, [lung], bones.plane(1.6), _vessels(frame, [lung], signs, study), extra)


def _broken_ribs(study: Study, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(side, rib) of four neighbouring broken ribs; empty without a fracture."""
    if "Fracture" not in study.findings:
        return []
    side, first = int(rng.choice([-1, 1])), int(rng.integers(2, 5))
    return [(side, first + offset) for offset in range(4)]


def _draw_rib(layer: Layer, curve: Points, width: float, broken: np.random.Generator | None) -> None:
    """A rib as a tube with bright rims; a broken one is cut, its outer part stepped aside, callus at its ends."""
    pieces = [curve]
    if broken is not None:
        cut = int(broken.integers(len(curve) // 2, len(curve) - 4))
        step = broken.uniform(1.5, 2.0) * width * float(broken.choice([-1, 1]))
        pieces = [curve[:cut], [(px, py + step) for px, py in curve[cut:]]]
    for piece in pieces:
        layer.stroke(piece, width, 0.62 if broken is None else 0.9)
        layer.stroke(piece, width * 0.5, 0.40 if broken is None else 0.8)
    if broken is not None:
        for end in (pieces[0][-1], pieces[1][0]):
            layer.blob(end, width * 1.4, 1.0)


def _vessels(frame: Frame, lungs: list[Lung], rng: np.random.Generator, study: Study) -> Plane:
    """Branching lines from the hila, thicker and longer with oedema."""
    layer = Layer(frame)
    thick = 1.6 if "Edema" in study.findings else 1.0
    for lung in lungs:
        for _ in range(22):
            root = lung.at(lung.root + rng.uniform(-0.06, 0.09), rng.uniform(0.38, 0.55))
            tip = lung.at(
                rng.uniform(lung.root - 0.5, 0.9) if lung.root else rng.uniform(0.45, 0.9), rng.uniform(0.05, 1.05)
            )
            bend = ((root[0] + tip[0]) / 2, (root[1] + tip[1]) / 2 + rng.uniform(-0.1, 0.1))
            points = _curve(root, bend, tip, 8)
            for part, width in ((points[:4], 0.018), (points[3:6], 0.011), (points[5:], 0.006)):
                layer.stroke(part, width * thick, 0.75)
        layer.blob(lung.at(lung.root + 0.02, 0.47), 0.055, 0.8)
    return layer.plane(1.5)


def _draw_findings(frame: Frame, study: Study, lungs: list[Lung], rng: np.random.Generator, lifted: int) -> Plane:
    """Draw the signs inside the lungs; returns brightness to add (lines, calcifications)."""
    found = study.findings
    lines = Layer(frame)
    extra = np.zeros_like(frame.x)

    def pick() -> Lung:
        return lungs[int(rng.integers(len(lungs)))]

    if "Atelectasis" in found:
        lung = next((lung for lung in lungs if lung.side == lifted), lungs[0])
        for _ in range(3):
            down = rng.uniform(0.56, 0.78)
            points = [lung.at(0.22, down + rng.uniform(-0.03, 0.03)), lung.at(0.9, down + rng.uniform(-0.06, 0.06))]
            lines.stroke(points, 0.026, 0.85)
    if "Consolidation" in found:
        lung, upper = pick(), rng.random() < 0.5
        slope = 0.25 * lung.hilum
        share = (lung.apex - slope - 0.42) if upper else (0.50 - lung.floor - slope)
        lobe = _soft(-share if upper else share, 0.02)
        lung.fill(0.88 * lobe)
        for _ in range(4):  # air bronchograms
            start = lung.at(0.15, 0.40 if upper else 0.55)
            end = lung.at(rng.uniform(0.4, 0.8), rng.uniform(0.12, 0.35) if upper else rng.uniform(0.7, 0.95))
            bronchus = Layer(frame)
            bronchus.stroke(_curve(start, (start[0], end[1]), end, 8), 0.014)
            extra -= 0.16 * bronchus.plane(1.2) * lobe * lung.mask
    if "Edema" in found:
        strength = rng.uniform(0.62, 0.8)
        for lung in lungs:
            wing = _gauss(frame, lung.at(0.30, 0.52), 0.17, 0.30)
            lung.fill(np.clip(wing * strength * (1 + 0.25 * _clouds(frame, rng, 24)), 0, 0.85))
            for row in range(6):
                points = [lung.at(0.86, 0.66 + 0.05 * row), lung.at(0.98, 0.66 + 0.05 * row)]
                lines.stroke(points, 0.008, 0.7)
    if "Pneumonia" in found:
        for lung in [pick()] if rng.random() < 0.6 else lungs:
            envelope = _gauss(frame, lung.at(rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.75)), 0.17, 0.2)
            lung.fill(np.clip(envelope * 1.5 * _soft(_clouds(frame, rng, 14) + 0.1, 1.2), 0, 0.9))
    if "Lung Opacity" in found and not found & set(LUNG_OPACITY_PARENTS):
        lung = pick()
        center = lung.at(rng.uniform(0.4, 0.6), rng.uniform(0.3, 0.7))
        lung.fill(np.clip(1.2 * _gauss(frame, center, 0.19, 0.24), 0, 0.62))
    if "Lung Lesion" in found:
        for _ in range(int(rng.integers(2, 5))):
            lung = pick()
            (cx, cy), radius = lung.at(rng.uniform(0.35, 0.8), rng.uniform(0.2, 0.75)), rng.uniform(0.085, 0.14)
            distance = np.hypot(frame.x - np.float32(cx), frame.y - np.float32(cy))
            lung.fill(np.asarray(0.95 * _soft(radius * (1 + 0.04 * _clouds(frame, rng, 30)) - distance, 0.02)))
    if "Pleural Other" in found:  # thickened pleura around the lung, partly calcified
        for lung in [pick()] if rng.random() < 0.5 else lungs:
            thick = rng.uniform(0.09, 0.13) * (1 + 0.25 * np.sin(frame.y * rng.uniform(9, 15)))
            rim: Plane = np.maximum(_soft(thick - lung.wall, 0.015), _soft(thick * 1.4 - lung.apex, 0.02))
            lung.fill(np.float32(0.92) * rim)
            extra += 0.14 * rim * lung.mask
            for down in rng.uniform(0.2, 0.9, 6):  # calcified plaques
                lines.stroke([lung.at(0.92, down), lung.at(0.94, down + 0.07)], 0.03, 1.0)
    if "Pleural Effusion" in found:
        for lung in [pick()] if rng.random() < 0.7 else lungs:
            level = rng.uniform(0.2, 0.45)
            out = np.clip(1 - lung.wall / 0.5, 0, 1)
            lung.fill(0.97 * _soft(level * (0.35 + 1.1 * out * out) - (lung.length - lung.apex), 0.03))
    if "Pneumothorax" in found:
        lung = pick()
        gap = rng.uniform(0.24, 0.36)
        edge = np.minimum(lung.wall - gap * np.clip(1.15 - lung.apex / 0.9, 0.15, 1), lung.apex - gap * 0.9)
        free = _soft(-edge, 0.015)
        lung.opacity = lung.opacity * (1 - 0.9 * free)
        lung.markings = lung.markings * (1 - free)
        extra += lung.mask * (0.35 * np.exp(-0.5 * (edge / 0.012) ** 2) - 0.22 * free)
        lung.fill(np.asarray(0.18 * _soft(edge, 0.02), dtype=np.float32))  # the collapsed lung is a little denser
    return np.asarray(extra + 0.22 * lines.plane(1.2), dtype=np.float32)


def _devices_frontal(frame: Frame, rng: np.random.Generator, base: float, chest: float) -> Plane:
    """Two to four of: tracheal tube, central line, stomach tube, pacemaker, electrodes, sternal wires."""
    layer = Layer(frame)
    for kind in rng.choice(6, int(rng.integers(2, 5)), replace=False):
        if kind == 0:
            for offset in (-0.014, 0.014):
                layer.stroke([(0.012 + offset, -0.99), (0.012 + offset, -0.40)], 0.011)
        elif kind == 1:
            side = float(rng.choice([-1, 1]))
            layer.stroke(_curve((side * 0.55, -0.95), (side * 0.05, -0.62), (-0.10, -0.05), 24), 0.022)
        elif kind == 2:
            layer.stroke(_curve((0.02, -0.99), (0.0, 0.2), (0.30, base + 0.22), 24), 0.022)
        elif kind == 3:
            layer.blob((0.50, -0.42), 0.1)
            layer.stroke(_curve((0.47, -0.47), (0.0, -0.75), (-0.02, 0.28), 24), 0.018)
            layer.stroke(_curve((0.47, -0.45), (-0.1, -0.6), (0.16, 0.36), 24), 0.018)
        elif kind == 4:
            for side, low in ((-1, -0.45), (1, -0.45), (1, 0.30), (-1, 0.32)):
                spot = (side * rng.uniform(0.42, 0.62), low + rng.uniform(-0.06, 0.06))
                layer.blob(spot, 0.038)
                layer.stroke(_curve(spot, (side * 0.75, low - 0.2), (side * rng.uniform(0.6, 0.9), -0.99)), 0.012, 0.9)
        else:
            for level in range(5):
                layer.blob((0.0, -0.30 + 0.14 * level), 0.042, 1.0, 0.014)
    return 0.6 * layer.plane(1.0)


def _letter(layer: Layer, where: tuple[float, float], rng: np.random.Generator) -> None:
    """The radiographer's R in a corner."""
    cx, cy = where[0] + rng.uniform(-0.04, 0.04), where[1] + rng.uniform(-0.04, 0.2)
    for points in ([(0, 0.1), (0, 0)], [(0, 0), (0.05, 0.02), (0.05, 0.04), (0, 0.055)], [(0.01, 0.055), (0.055, 0.1)]):
        layer.stroke([(cx + px, cy + py) for px, py in points], 0.014)
