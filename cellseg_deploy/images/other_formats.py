"""Identify files that are not PNG, JPEG or TIFF by their first bytes, and advise what to do with them."""

from __future__ import annotations

_CONVERT = "convert it to PNG or TIFF"
_MICROSCOPE = "export its images as TIFF with the microscope's software or Fiji (Bio-Formats)"
_CZI = f"with the ending .czi it is counted by region, by cellseg-slide or run_slide; else {_MICROSCOPE}"
_AT_START = (
    (b"BM", "a BMP image", _CONVERT),
    ((b"GIF87a", b"GIF89a"), "a GIF image", _CONVERT),
    ((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), "a JPEG 2000 image", _CONVERT),
    ((b"\0\0\0\x0cJXL ", b"\xff\x0a"), "a JPEG XL image", _CONVERT),
    (b"II\xbc\x01", "a JPEG XR image", _CONVERT),
    (b"8BPS", "a Photoshop document", _CONVERT),
    ((b"P1\n", b"P2\n", b"P3\n", b"P4\n", b"P5\n", b"P6\n", b"P1 ", b"P2 ", b"P3 "), "a PNM image", _CONVERT),
    ((b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FUJIFILMCCD-RAW"), "a camera's raw file", _CONVERT),
    (b"ZISRAWFILE", "a Zeiss CZI file", _CZI),
    (b"\xda\xce\xbe\x0a", "a Nikon ND2 file", _MICROSCOPE),
    (b"\x70\0\0\0", "a Leica LIF file", _MICROSCOPE),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an OLE file (Zeiss ZVI, Olympus OIB, Office)", _MICROSCOPE),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Imaris)", _MICROSCOPE),
    (b"\x93NUMPY", "a NumPy array", "save it as TIFF"),
    (b"%PDF", "a PDF document", "export its picture as PNG"),
    (b"%!PS", "a PostScript document", "export its picture as PNG"),
    ((b"PK\3\4", b"PK\5\6"), "a ZIP archive", "unpack it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the image", "fetch the image with git lfs pull"),
)
# The brand of an ISO base media file, ISO/IEC 14496-12.
_BRANDS = (
    ((b"avif", b"avis"), "an AVIF image", _CONVERT),
    ((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "a HEIC photograph", _CONVERT),
    ((b"crx ",), "a camera's raw file", _CONVERT),
)
_MARKUP = (
    ((b"<!doctype html", b"<html"), "a web page, as of a download that was refused", "download the image again"),
    ((b"<svg", b"<?xml"), "an XML document", "export its picture as PNG"),
)


def what_it_is(head: bytes) -> str:
    """Name the format of a file that begins with ``head`` (200 bytes or more) and what to do with it; "" if unknown.

    >>> what_it_is(b"GIF89a")
    'this is a GIF image; convert it to PNG or TIFF'
    """
    if head[4:8] == b"ftyp":
        brands = (head[8:12], *(head[at : at + 4] for at in range(16, min(int.from_bytes(head[:4]), 64), 4)))
        for known, what, advice in _BRANDS:  # mif1 only means "a picture": the others come first
            if any(brand in known for brand in brands):
                return f"this is {what}; {advice}"
        return "this is a video; save the picture you want as PNG or TIFF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return f"this is a WebP image; {_CONVERT}"
    if head[128:132] == b"DICM":
        return f"this is a DICOM file; {_CONVERT}"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for starts, what, advice in _MARKUP:
        if text.startswith(starts):
            return f"this is {what}; {advice}"
    return next((f"this is {what}; {advice}" for starts, what, advice in _AT_START if head.startswith(starts)), "")
