"""DICOM: stored pixels whatever their compression, shown as pydicom would, five header fields, else a named reason."""

import io
import random
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="pip install 'cxrdist[dicom]'")
gdcm = pytest.importorskip("gdcm", reason="pip install 'cxrdist[dicom]'")
pytest.importorskip("openjpeg", reason="pip install 'cxrdist[dicom]'")

from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid  # noqa: E402

from cxrdist.shards import convert, dicom  # noqa: E402
from cxrdist.shards.convert import Converted, Pixels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR")  # of what the tests write

MARKER = "JANEROE"
SYNTAXES = gdcm.TransferSyntax


def ramp(height: int = 40, width: int = 52, bits: int = 12, signed: bool = False) -> np.ndarray:
    values = np.linspace(0, (1 << bits) - 1, height * width).reshape(height, width).round().astype(int)
    return values - (1 << (bits - 1)) if signed else values


def dataset(values: np.ndarray | None = None, bits: int = 12, signed: bool = False, **fields: Any) -> Dataset:
    """A small chest radiograph of these stored values."""
    values = ramp(bits=bits, signed=signed) if values is None else values
    allocated = 8 if bits == 8 else 16
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = ComputedRadiographyImageStorage
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = generate_uid()
    made.Modality, made.BodyPartExamined, made.PatientID = "CR", "CHEST", "p1"
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.Rows, made.Columns = values.shape
    made.BitsAllocated, made.BitsStored, made.HighBit = allocated, bits, bits - 1
    made.PixelRepresentation = int(signed)
    made.PixelData = (values.astype(np.int64) & ((1 << allocated) - 1)).astype(f"<u{allocated // 8}").tobytes()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def written(made: Dataset, implicit: bool = False) -> bytes:
    output = io.BytesIO()
    if implicit:
        made.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_as(output, enforce_file_format=True)
    return output.getvalue()


def reason(made: Dataset) -> str:
    found = convert.convert_bytes(written(made))
    assert isinstance(found, str), "it was converted"
    assert "\n" not in found
    return found


def shown(made: Dataset) -> np.ndarray:
    return dicom.read(written(made)).pixels


def chest(name: str) -> bytes:
    path = get_testdata_file(f"{name}.dcm", download=False)
    if path is None:
        pytest.skip(f"{name}.dcm comes with pip install pydicom-data")
    return Path(path).read_bytes()


def stored(content: bytes) -> np.ndarray:
    return dicom.stored_values(dicom.parsed(content))


def transcoded(content: bytes, syntax: int, folder: Path) -> bytes:
    source, output = str(folder / "source.dcm"), str(folder / "transcoded.dcm")
    Path(source).write_bytes(content)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(source)
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(output)
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return Path(output).read_bytes()


def with_frame(frame: bytes, syntax: str, **fields: Any) -> Dataset:
    """A file whose pixels are this codestream."""
    made = dataset(**fields)
    made.file_meta.TransferSyntaxUID = syntax
    made.PixelData = encapsulate([frame])
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    return made


def test_a_real_chest_is_the_same_in_jpeg_2000_and_uncompressed() -> None:
    irreversible, reversible = ([stored(chest(f"RG1_{kind}{end}")) for kind in ("UNC", "J2K")] for end in "IR")
    for uncompressed, compressed in (irreversible, reversible):
        assert uncompressed.shape == (1955, 1841)
        assert np.array_equal(uncompressed, compressed)
    assert np.abs(irreversible[0].astype(int) - reversible[0]).max() == 403
    assert np.array_equal(irreversible[0], pydicom.dcmread(get_testdata_file("RG1_UNCI.dcm")).pixel_array)


@pytest.mark.parametrize(
    ("name", "uid"),
    [
        ("JPEGLosslessProcess14", "1.2.840.10008.1.2.4.57"),
        ("JPEGLosslessProcess14_1", "1.2.840.10008.1.2.4.70"),
        ("JPEGLSLossless", "1.2.840.10008.1.2.4.80"),
        ("RLELossless", "1.2.840.10008.1.2.5"),
        ("JPEG2000Lossless", "1.2.840.10008.1.2.4.90"),
        ("DeflatedExplicitVRLittleEndian", "1.2.840.10008.1.2.1.99"),
        ("ExplicitVRBigEndian", "1.2.840.10008.1.2.2"),
        ("ImplicitVRLittleEndian", "1.2.840.10008.1.2"),
    ],
)
def test_a_real_chest_transcoded_without_loss_is_the_same(name: str, uid: str, tmp_path: Path) -> None:
    source = chest("RG1_UNCI")
    content = transcoded(source, getattr(SYNTAXES, name), tmp_path)
    assert dicom.parsed(content).file_meta.TransferSyntaxUID == uid
    assert np.array_equal(stored(content), stored(source))


@pytest.mark.fast
@pytest.mark.parametrize("bits", [8, 10, 12, 15, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_every_depth_survives_every_lossless_compression(bits: int, signed: bool, tmp_path: Path) -> None:
    source = written(dataset(bits=bits, signed=signed))
    assert np.array_equal(stored(source), ramp(bits=bits, signed=signed))
    names = ["JPEGLosslessProcess14_1", "RLELossless", "JPEG2000Lossless"] + ["JPEGLSLossless"] * (not signed)
    for name in names:
        assert np.array_equal(stored(transcoded(source, getattr(SYNTAXES, name), tmp_path)), stored(source)), name
    own = pydicom.dcmread(io.BytesIO(source))
    own.compress(pydicom.uid.RLELossless)
    assert np.array_equal(stored(written(own)), stored(source))


@pytest.mark.fast
def test_lossy_jpeg_of_8_bits_is_what_pillow_decodes() -> None:
    for uid in (pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEGExtended12Bit):
        output = io.BytesIO()
        Image.fromarray(ramp(bits=8).astype(np.uint8)).save(output, "JPEG", quality=90)
        made = with_frame(output.getvalue(), uid, bits=8)
        assert np.array_equal(stored(written(made)), Image.open(output))


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("bits", "signed", "slope"), [(8, False, 1), (12, False, 2), (12, True, 0.5), (16, True, 1)])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_window_and_inversion_are_pydicoms(kind: str, bits: int, signed: bool, slope: float, photometric: str) -> None:
    made = dataset(bits=bits, signed=signed, RescaleSlope=slope, RescaleIntercept=-100)
    made.PhotometricInterpretation, made.VOILUTFunction = photometric, kind
    middle = float(apply_modality_lut(ramp(bits=bits, signed=signed), made).mean())
    made.WindowCenter, made.WindowWidth = [round(middle), 1], [round((1 << bits) * slope / 3), 5]  # the first is taken
    expected = apply_voi_lut(apply_modality_lut(ramp(bits=bits, signed=signed), made), made)
    low, high = (apply_modality_lut(np.array(end), made) for end in (ramp(bits=bits, signed=signed).flat[[0, -1]]))
    expected = (expected - low) / (high - low) * 255
    if photometric == "MONOCHROME1":
        expected = 255 - expected
    assert np.abs(shown(made) - expected).max() <= 1
    assert np.ptp(shown(made)) > 200


@pytest.mark.fast
@pytest.mark.parametrize("implicit", [False, True])
def test_lookup_tables_are_pydicoms_and_come_before_a_window(implicit: bool) -> None:
    made = dataset(WindowCenter=7, WindowWidth=3)
    for name, entries, first, bits in (("ModalityLUTSequence", 4096, 0, 16), ("VOILUTSequence", 900, 300, 12)):
        item = Dataset()
        item.add_new("LUTDescriptor", "US", [entries, first, bits])
        table = (np.linspace(0, 1, entries) ** 0.5 * (1000 if bits == 16 else 4095)).astype("<u2")
        item.add_new("LUTData", "OW", table.tobytes())
        setattr(made, name, Sequence([item]))
    made.ModalityLUTSequence[0].ModalityLUTType = "US"
    expected = apply_voi_lut(apply_modality_lut(ramp(), made), made) / 4095 * 255
    assert np.abs(dicom.read(written(made, implicit)).pixels - expected).max() <= 1


@pytest.mark.fast
def test_without_a_window_the_range_of_what_is_not_padding_is_shown() -> None:
    values = np.full((20, 20), 63, int)  # background, also where it lies within the image's range
    values[5:15, 5:15] = np.linspace(500, 900, 100).reshape(10, 10)
    for fields in ({"PixelPaddingValue": 63}, {"PixelPaddingValue": 100, "PixelPaddingRangeLimit": 0}):
        for photometric in ("MONOCHROME1", "MONOCHROME2"):
            pixels = shown(dataset(values, PhotometricInterpretation=photometric, **fields))
            inside = (values[5:15, 5:15] - 500) / 400 * 255
            expected = inside if photometric == "MONOCHROME2" else 255 - inside
            assert np.abs(pixels[5:15, 5:15] - expected).max() <= 0.5
            pixels[5:15, 5:15] = 0
            assert not pixels.any()
    windowed = shown(dataset(values, PixelPaddingValue=63, PhotometricInterpretation="MONOCHROME1", WindowCenter=700,
                             WindowWidth=400))  # fmt: skip
    assert windowed[0, 0] == 0
    assert windowed[5, 5] > 250
    assert not shown(dataset(np.full((9, 9), 5), PixelPaddingValue=5)).any()
    assert np.array_equal(shown(dataset(PixelPaddingValue=0xF000 + 500)), shown(dataset()))  # no 12-bit value
    assert not shown(dataset(np.full((9, 9), 5))).any()


@pytest.mark.fast
@pytest.mark.parametrize("implicit", [False, True])
def test_padding_of_signed_pixels_is_meant_signed(implicit: bool) -> None:
    values = ramp(20, 20, bits=12, signed=True)
    values[:10] = -2000
    made = dataset(values, signed=True, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1")
    made["PixelPaddingValue"].VR = "SS"
    pixels = dicom.read(written(made, implicit)).pixels
    assert not pixels[:10].any()
    assert pixels[10, 0] == 255


@pytest.mark.fast
@pytest.mark.parametrize("width", [0, 1, -5])
def test_a_window_that_means_nothing_is_not_used(width: int) -> None:
    assert np.array_equal(shown(dataset(WindowCenter=5, WindowWidth=width)), shown(dataset()))


@pytest.mark.fast
def test_the_header_gives_five_fields() -> None:
    made = dataset(StudyInstanceUID="1.2.3", ViewPosition="PA", PatientSex="F", PatientAge="045Y")
    converted = convert.convert_bytes(written(made))
    assert isinstance(converted, Converted)
    assert converted.header == {"patient": "p1", "study": "1.2.3", "view": "PA", "sex": "F", "age": "45"}
    assert (converted.width, converted.height, converted.orientation, converted.channels) == (52, 40, 1, 1)
    bare = dataset()
    for name in ("PatientID", "Modality", "BodyPartExamined"):
        delattr(bare, name)
    converted = convert.convert_bytes(written(bare))
    assert isinstance(converted, Converted)
    assert converted.header == dict.fromkeys(("patient", "study", "view", "sex", "age"), "")
    for name in ("Müller 7", "陽子"):
        made = dataset(PatientID=name, SpecificCharacterSet="ISO_IR 192")
        assert dicom.read(written(made)).header["patient"] == name


@pytest.mark.fast
def test_ages_are_years() -> None:
    ages = {"045Y": "45", "018M": "1.5", "006W": "0.11", "010D": "0.03", "61": "61", "000Y": "0", " 7y": "7"}
    assert {age: dicom.years(age) for age in ages} == ages
    assert {dicom.years(age) for age in ("", "Y", "238Y", "old", "4.5", "-3Y", "045Z")} == {""}


@pytest.mark.fast
def test_no_other_field_leaves_the_file() -> None:
    made = dataset(bits=8, StudyInstanceUID="1.2.3", ViewPosition="PA", PatientSex="F", PatientAge="045Y")
    output, exif = io.BytesIO(), Image.Exif()
    exif[0x010E] = MARKER
    Image.fromarray(ramp(bits=8).astype(np.uint8)).save(output, "JPEG", exif=exif, comment=MARKER.encode())
    made = with_frame(output.getvalue(), pydicom.uid.JPEGBaseline8Bit, bits=8)
    kept = {dicom.FIELDS[name]: f"{MARKER} {name}" for name in ("patient", "view", "sex")}
    for keyword, value in kept.items():
        setattr(made, keyword, value)
    made.StudyInstanceUID, made.PatientAge = "1.2.3", "045Y"
    texts = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"}
    identifying = 0
    for tag, (vr, _, _, retired, keyword) in pydicom.datadict.DicomDictionary.items():
        known = retired or keyword in ("", "SpecificCharacterSet", *dicom.NEEDED)
        if vr in texts and not known and tag >> 16 in (8, 16, 24, 32, 64):
            made.add_new(tag, vr, MARKER)
            identifying += 1
    assert identifying > 300
    for keyword in ("PatientBirthDate", "StudyDate"):
        made.add_new(keyword, "LO", MARKER)
    made.SOPInstanceUID = MARKER
    made.file_meta.SourceApplicationEntityTitle = MARKER
    made.private_block(0x0011, MARKER, create=True).add_new(1, "LO", MARKER)
    nested = Dataset()
    nested.PatientName, nested.RequestedProcedureDescription = MARKER, MARKER
    made.RequestAttributesSequence = Sequence([nested])
    made.preamble = MARKER.encode().ljust(128, b"\0")
    content = written(made)
    assert content.count(MARKER.encode()) > 300
    converted = convert.convert_bytes(content)
    assert isinstance(converted, Converted)
    assert converted.header == {
        **{"patient": f"{MARKER} patient", "view": f"{MARKER} view", "sex": f"{MARKER} sex"},
        **{"study": "1.2.3", "age": "45"},
    }
    assert MARKER not in str([value for name, value in vars(converted).items() if name != "header"])
    assert MARKER.encode() not in converted.jpeg


@pytest.mark.fast
def test_a_reason_quotes_nothing_of_the_patient() -> None:
    for name in ("Modality", "BodyPartExamined", "PhotometricInterpretation", "WindowCenter", "NumberOfFrames", "Rows"):
        made = dataset()
        made.WindowWidth = 5
        made.add_new(name, "LO", MARKER)
        found = convert.convert_bytes(written(made))
        assert MARKER not in str(found), name
    made = dataset()
    made.file_meta.add_new("TransferSyntaxUID", "UI", MARKER)
    content = written(dataset()).replace(b"1.2.840.10008.1.2.1\0", MARKER.encode().ljust(20, b"\0"))
    assert convert.convert_bytes(content) == "DICOM in an unknown transfer syntax"


@pytest.mark.fast
def test_every_refusal_is_named() -> None:
    colour = dataset(bits=8, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)
    assert reason(colour) == "DICOM in colour (RGB)"
    assert reason(dataset(PhotometricInterpretation="PALETTE COLOR")) == "DICOM in colour (PALETTE COLOR)"
    assert reason(dataset(NumberOfFrames=12)) == "multi-frame DICOM (12 frames)"
    for part in ("HAND", "FOREARM", "LSPINE"):
        assert reason(dataset(BodyPartExamined=part)) == f"DICOM of body part {part}, not the chest"
    assert "unknown kind, not the chest" in reason(dataset(BodyPartExamined="ROE JANE"))
    for part in ("CHEST", "Thorax", "LUNG", "PORT CHEST", "TORAX", ""):
        assert isinstance(convert.convert_bytes(written(dataset(BodyPartExamined=part))), Converted)
    assert reason(dataset(Modality="CT")) == "DICOM of modality CT; chest radiographs are CR, DX, RG, DR, OT"
    assert "modality of an unknown kind" in reason(dataset(Modality="ROE JANE"))
    empty = dataset()
    del empty.PixelData
    assert reason(empty) == "DICOM without pixel data"
    assert reason(dataset(Rows=60000, Columns=60000)) == "DICOM of 60000 x 60000 pixels"
    assert reason(dataset(Rows=0)) == "DICOM of 52 x 0 pixels"
    for fields in ({"BitsAllocated": 32}, {"BitsStored": 7, "HighBit": 6}, {"HighBit": 15}, {"BitsStored": 17}):
        assert "8 to 16 bits, right-aligned, are read" in reason(dataset(**fields))
    assert "pixels cannot be decoded" in reason(dataset(Rows=500))
    assert "no JPEG codestream" in reason(with_frame(b"nothing", pydicom.uid.JPEG2000))
    assert "MPEG2 Main Profile" in reason(with_frame(b"nothing", pydicom.uid.MPEG2MPML))
    twelve = b"\xff\xd8\xff\xc1\0\x0b\x0c" + bytes([0, 40, 0, 52, 1, 1, 17, 0]) + b"\xff\xda\0\x08" + bytes(20)
    assert reason(with_frame(twelve, pydicom.uid.JPEGExtended12Bit)).startswith("DICOM in lossy JPEG of 12 bits")
    assert "no finite number" in reason(dataset(RescaleSlope="1e308", RescaleIntercept="1e308"))
    assert convert.convert_bytes(written(dataset())[:140]) == "DICOM without pixel data"
    assert "pixels cannot be decoded" in str(convert.convert_bytes(written(dataset())[:-1000]))


@pytest.mark.fast
def test_without_the_extra_the_reason_is_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dicom.dicom_available() == ""
    monkeypatch.setattr(dicom, "EXTRA", ("pydicom", "no_such_module"))
    assert dicom.dicom_available() == "DICOM needs: pip install 'cxrdist[dicom]'"
    assert reason(dataset()) == dicom.dicom_available()


@pytest.mark.fast
def test_pydicom_is_imported_for_dicom_alone(tmp_path: Path) -> None:
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    code = f"""
import sys
from cxrdist.shards.convert import Converted, convert
assert isinstance(convert({str(tmp_path / "a.png")!r}), Converted)
assert not {{"pydicom", "gdcm", "openjpeg"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jpeg_png_and_dicom_lie_in_one_folder(tmp_path: Path) -> None:
    grey = Image.fromarray((ramp() >> 4).astype(np.uint8))
    grey.save(tmp_path / "a.png")
    grey.save(tmp_path / "b.jpg", quality=95)
    (tmp_path / "c.dcm").write_bytes(written(dataset()))
    (tmp_path / "d").write_bytes(written(dataset()))  # DICOM is told by its content
    grey.save(tmp_path / "e.dcm", "PNG")
    images = [SimpleNamespace(path=str(path), reason="") for path in sorted(tmp_path.iterdir())]
    for pixels in (Pixels(), Pixels("fast", 384, "pad")):
        alone = [converted for _, converted in convert.convert_in_order(iter(images), pixels, 1)]
        assert [converted for _, converted in convert.convert_in_order(iter(images), pixels, 2)] == alone
        assert [bool(result.header) for result in alone if isinstance(result, Converted)] == [0, 0, 1, 1, 0]
        pictures = [np.asarray(Image.open(io.BytesIO(result.jpeg))).astype(int) for result in alone]  # type: ignore[union-attr]
        for picture in pictures:
            assert picture.shape == (pixels.size_px, pixels.size_px)
            assert np.abs(picture - pictures[0]).max() <= 6


@pytest.mark.fast
def test_what_claims_to_be_huge_ends_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dicom, "MAX_BYTES", 1 << 20)
    plain = written(dataset())
    at = plain.index(b"\x08\0\x16\0UI")  # the first element behind the meta information
    deep = b"\x08\0\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * 20_000
    many = b"".join(b"\x09\0" + number.to_bytes(2, "little") + b"LO\0\0" for number in range(60_000)) * 2
    bomb = transcoded(plain, SYNTAXES.DeflatedExplicitVRLittleEndian, tmp_path)
    bomb = bomb[: 144 + int.from_bytes(bomb[140:144], "little")]  # its meta information
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb += deflater.compress(plain[at:] + bytes(1 << 24)) + deflater.flush()
    reasons = {
        "damaged DICOM: its header cannot be read": plain[:at] + deep + plain[at:],
        "too many elements": plain[:at] + many + plain[at:],
        "bytes of PatientID": plain.replace(b"\x10\0\x20\0LO\x02\0", b"\x10\0\x20\0UT\0\0\xfe\xff\xff\xff"),
        "inflates to more than 1 MiB": bomb,
    }
    start = time.monotonic()
    for words, content in reasons.items():
        assert words in str(convert.convert_bytes(content)), words
    assert time.monotonic() - start < 20
    huge = tmp_path / "huge.dcm"
    huge.write_bytes(plain + bytes(1 << 20))
    assert convert.convert(str(huge)) == "larger than 1 MiB"


def mutated(content: bytes, draw: random.Random, start: int) -> bytes:
    changed = bytearray(content)
    if draw.random() < 0.25:
        del changed[draw.randrange(start, len(changed)) :]
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        changed[draw.randrange(start, len(changed))] = draw.choice([0, 255, 127, draw.randrange(256)])
    return bytes(changed)


def test_damaged_files_end_as_a_reason_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    source = written(dataset())
    output = io.BytesIO()
    Image.fromarray(ramp(bits=8).astype(np.uint8)).save(output, "JPEG")
    files = [source, written(with_frame(output.getvalue(), pydicom.uid.JPEGBaseline8Bit, bits=8))]
    names = ("JPEGLosslessProcess14_1", "JPEGLSLossless", "RLELossless", "JPEG2000Lossless")
    files += [transcoded(source, getattr(SYNTAXES, name), tmp_path) for name in names]
    files += [transcoded(source, SYNTAXES.DeflatedExplicitVRLittleEndian, tmp_path)]
    capfd.readouterr()
    slowest = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(60 * len(files)):
            content = files[number % len(files)]
            pixels = content.find(b"\xe0\x7f\x10\0")
            start = time.monotonic()
            found = convert.convert_bytes(mutated(content, draw, pixels if pixels > 0 and draw.random() < 0.5 else 132))
            slowest = max(slowest, time.monotonic() - start)
            assert isinstance(found, Converted) or "\n" not in found
    assert slowest < 5
    assert capfd.readouterr() == ("", "")
