"""What a file says of its making in XMP, and whether Content Credentials are in it.

in   properties {name: text}; a video or sound file
out  an XMP packet (ISO 16684-1), which goes into mp4, mov, wav and flac here, and into Matroska as
     the tag XMP (common/mux.py); the packet in a file; what it says

Files are read box by box or chunk by chunk, without FFmpeg, which passes both over.
"""

import html
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

TAG = "XMP"  # the key under which a file's tags hand a packet to whoever writes the file
MOST = 2**20  # bytes of a packet that is read
# boxes of their own kind in mp4 and mov, chunks in RIFF
XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
CREDENTIALS_BOX = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
XMP_CHUNK = b"_PMX"
UNKNOWN = 2**32 - 1  # what a chunk of RF64 has as its size if 32 bits do not hold it
CREDENTIALS_CHUNK = b"C2PA"
CREDENTIALS_TYPE = b"application/c2pa\0"
FLAC_COMMENTS = 4  # the kind of block in flac
# of the first box of mp4 and mov
ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
# vocabularies: XMP's own, IPTC's (Photo Metadata Standard 2025.1), and ours
NAMESPACES = {
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "foley": "urn:diff-foley-compact:generation/",
}
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
# how each property is called there
PROPERTIES = {
    "source_type": "Iptc4xmpExt:DigitalSourceType",
    "system": "Iptc4xmpExt:AISystemUsed",
    "system_version": "Iptc4xmpExt:AISystemVersionUsed",
    "tool": "xmp:CreatorTool",
    "model": "foley:model",
    "weights": "foley:weightsSHA256",
    "seed": "foley:seed",
    "settings": "foley:settings",
    "watermark": "foley:watermark",
}


# ---- the packet --------------------------------------------------------------------------------


def escape(text: str) -> str:
    """Text as an attribute of XML holds it. (xml.sax would import all of urllib.)"""
    return html.escape(text).replace("\n", "&#10;").replace("\t", "&#9;").replace("\r", "&#13;")


def make_packet(properties: dict[str, str]) -> str:
    """An XMP packet of properties, named as in PROPERTIES."""
    spaces = [f'xmlns:{prefix}="{uri}"' for prefix, uri in NAMESPACES.items()]
    values = [f'{PROPERTIES[name]}="{escape(text)}"' for name, text in properties.items()]
    inside = "\n    ".join(spaces + values)
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        f' <rdf:RDF xmlns:rdf="{RDF}">\n'
        f'  <rdf:Description rdf:about=""\n    {inside}/>\n'
        " </rdf:RDF>\n"
        "</x:xmpmeta>\n"
        '<?xpacket end="w"?>'
    )


def parse_packet(packet: str) -> dict[str, str]:
    """What a packet says of PROPERTIES, whoever wrote it; {} where it is no XMP."""
    names = {}
    for name, qualified in PROPERTIES.items():
        prefix, local = qualified.split(":")
        names[f"{{{NAMESPACES[prefix]}}}{local}"] = name
    # a document type, which XMP does not need, could define entities that grow without end
    if "<!" in packet:
        return {}
    try:
        root = ElementTree.fromstring(packet.replace("\ufeff", "").strip().strip("\0"))
    except (ElementTree.ParseError, ValueError):
        return {}
    # as attributes of a description or as elements in it: both are XMP
    said = {}
    for description in root.iter(f"{{{RDF}}}Description"):
        said |= description.attrib
        said |= {element.tag: element.text or "" for element in description}
    return {name: said[key].strip() for key, name in names.items() if key in said}


# ---- files -------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A top-level box of mp4 or mov, or a chunk of a RIFF file."""

    name: bytes  # four letters, or the 16 bytes that name a uuid box
    first: int  # offset of what it holds
    length: int  # bytes of that


def iso_boxes(file, end) -> Iterator[Part]:
    """The top-level boxes of an mp4 or mov, up to the first that cannot be."""
    at = 0
    while at + 8 <= end:
        file.seek(at)
        size, name = struct.unpack(">I4s", file.read(8))
        first = at + 8
        # 1: the size follows in 64 bits; 0: up to the file's end
        if size == 1:
            longer = file.read(8)
            size = int.from_bytes(longer, "big") if len(longer) == 8 else 0
            first += 8
        elif size == 0:
            size = end - at
        if name == b"uuid":
            file.seek(first)
            name = file.read(16)
            first += 16
        if at + size > end or first > at + size:
            return
        yield Part(name, first, at + size - first)
        at += size


def riff_chunks(file, end) -> Iterator[Part]:
    """The chunks of a wav, RF64 or avi, up to the first that cannot be."""
    at = 12
    sound = 0  # bytes of an RF64's sound, which its first chunk says in 64 bits
    while at + 8 <= end:
        file.seek(at)
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"ds64":
            sound = int.from_bytes(file.read(16)[8:], "little")
        elif name == b"data" and size == UNKNOWN:
            size = sound
        if at + 8 + size > end:
            return
        yield Part(name, at + 8, size)
        at += 8 + size + size % 2


def parts_of(file) -> Iterator[Part]:
    """The boxes or chunks of an open file; of other kinds none."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] in (b"RIFF", b"RF64"):
        yield from riff_chunks(file, end)
    elif head[4:8] in ISO_BOXES:
        yield from iso_boxes(file, end)


def read(path: Path | str) -> str | None:
    """The XMP packet in an mp4, mov, wav or avi, or None. Raises OSError."""
    with open(path, "rb") as file:
        for part in parts_of(file):
            if part.name in (XMP_BOX, XMP_CHUNK) and part.length <= MOST:
                file.seek(part.first)
                return file.read(part.length).decode("utf-8", "replace")
    return None


def has_credentials(path: Path | str) -> bool:
    """Whether a file carries Content Credentials (C2PA). Raises OSError.

    Of mp4, mov, wav and avi by box or chunk, of flac and mp3 by the tag before the sound.
    """
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":
            # the tag's size is written in the lower seven bits of four bytes
            size = sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
            return CREDENTIALS_TYPE in file.read(min(size, MOST))
        names = {part.name for part in parts_of(file)}
    return not names.isdisjoint((CREDENTIALS_BOX, CREDENTIALS_CHUNK))


def embed(file, packet: str):
    """Add a packet to an mp4, mov, wav or flac, open for reading and writing.

    To the end of the first three, where nothing else moves; in flac among the comments, as "XMP".
    Raises ValueError for other kinds of files.
    """
    content = packet.encode()
    file.seek(0)
    head = file.read(12)
    end = file.seek(0, io.SEEK_END)
    if head[:4] in (b"RIFF", b"RF64"):
        # chunks begin at even offsets; the file's size is written at its beginning
        padding = b"\0" * (end % 2)
        chunk = XMP_CHUNK + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        file.write(padding + chunk)
        size = end + len(padding) + len(chunk) - 8
        # of RF64 in 64 bits, in the chunk that follows
        file.seek(4 if head[:4] == b"RIFF" else 20)
        file.write(struct.pack("<I" if head[:4] == b"RIFF" else "<Q", size))
    elif head[4:8] in ISO_BOXES:
        file.write(struct.pack(">I4s", 24 + len(content), b"uuid") + XMP_BOX + content)
    elif head[:4] == b"fLaC":
        file.seek(0)
        commented = with_flac_comment(file.read(), b"XMP=" + content)
        file.seek(0)
        file.write(commented)
    else:
        raise ValueError("XMP goes into mp4, mov, wav and flac here")


def with_flac_comment(flac: bytes, comment: bytes) -> bytes:
    """A flac file with one more comment (a Vorbis comment, RFC 9639 section 8.6)."""
    at = 4
    while flac[at] & 0x7F != FLAC_COMMENTS:
        if flac[at] & 0x80:
            raise ValueError("no block of comments in this flac")
        at += 4 + int.from_bytes(flac[at + 1 : at + 4], "big")
    size = int.from_bytes(flac[at + 1 : at + 4], "big")
    block = flac[at + 4 : at + 4 + size]
    # the writer's name, how many comments, and these, each after its length
    count = 4 + struct.unpack_from("<I", block)[0]
    number = struct.unpack_from("<I", block, count)[0] + 1
    block = block[:count] + struct.pack("<I", number) + block[count + 4 :]
    block += struct.pack("<I", len(comment)) + comment
    header = flac[at : at + 1] + len(block).to_bytes(3, "big")
    return flac[:at] + header + block + flac[at + 4 + size :]
