"""The hook that puts our emulator into domains: as libvirt and KubeVirt start it, on real XML.

``tests/libvirt/xml``: what libvirt 9.0.0 itself prints for a plain domain and for one as Nova makes
them, and a domain of the shape that KubeVirt hands to sidecars.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sharded_pc.cli import main
from sharded_pc.libvirt import hook
from sharded_pc.libvirt.install import PLACE, install_hook
from tests.libvirt.domain import QEMU

XML = Path(__file__).parent / "libvirt" / "xml"
LIBVIRT, NOVA, KUBEVIRT = (
    (XML / f"{each}.xml").read_bytes() for each in ("libvirt", "nova", "kubevirt")
)
OURS = sys.executable
"""Any executable stands for the emulator here."""
MIGRATE = ("guest0", "migrate", "begin", "-")


@pytest.fixture
def run(tmp_path):
    """Starts the installed hook with a rule, as libvirt does: what it prints, what it complains."""
    settings = tmp_path / "sharded-pc.toml"
    place = install_hook(Path(OURS), tmp_path)
    source = place.read_text()
    assert source.count(f'"{hook.SETTINGS}"') == 1
    place.write_text(source.replace(hook.SETTINGS, str(settings)))

    def start(rule: str | None, text: bytes = LIBVIRT, words=MIGRATE) -> tuple[bytes, str]:
        if rule is not None:
            settings.write_text(rule)
        done = subprocess.run([place, *words], input=text, capture_output=True, env={}, cwd="/")
        assert done.returncode == 0, "libvirt would refuse the migration"
        return done.stdout, done.stderr.decode()

    return start


def emulators(text: bytes) -> list[str | None]:
    return [each.text for each in ElementTree.fromstring(text).findall("devices/emulator")]


def without_emulator(text: bytes) -> str:
    """The rest of a domain, canonical."""
    root = ElementTree.fromstring(text)
    devices = root.find("devices")
    assert devices is not None
    for each in devices.findall("emulator"):
        devices.remove(each)
    return ElementTree.canonicalize(ElementTree.tostring(root), strip_text=True)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (LIBVIRT, None),
        (LIBVIRT, "workers = 4"),
        (LIBVIRT, "least-memory = 16777216"),
        (LIBVIRT, 'guests = ["nobody", "guest*"]'),
        (NOVA, 'least-memory = "128G"'),
        (NOVA, 'guests = ["instance-0000002a"]\nleast-memory = "131072M"'),
        (KUBEVIRT, 'least-memory = "64g"'),
    ],
)
def test_a_domain_that_is_chosen_differs_by_its_emulator_only(run, text, rule):
    out, complaint = run(rule, text)
    assert complaint == ""
    assert emulators(out) == [OURS]
    assert without_emulator(out) == without_emulator(text)


@pytest.mark.parametrize(
    "rule",
    [
        'least-memory = "17M"',
        'guests = ["guest", "GUEST0"]',
        "guests = []",
        'guests = ["*"]\nleast-memory = "1G"',
    ],
)
def test_a_domain_that_is_not_chosen_is_left_alone(run, rule):
    assert run(rule) == (b"", "")


@pytest.mark.parametrize("words", [("guest0", "prepare", "begin", "-"), ("guest0", "started"), ()])
def test_other_calls_say_nothing(run, words):
    assert run(None, words=words) == (b"", "")


@pytest.mark.parametrize(
    ("old", "new"), [(b"arch='x86_64'", b"arch='s390x'"), (b"type='qemu'", b"type='xen'")]
)
def test_a_domain_that_cannot_be_received_is_left_alone(run, old, new):
    assert old in LIBVIRT
    assert run(None, LIBVIRT.replace(old, new, 1)) == (b"", "")


def test_a_domain_that_has_ours_keeps_it(run):
    assert run(None, LIBVIRT.replace(QEMU.encode(), OURS.encode())) == (b"", "")


def test_a_domain_that_comes_from_shards_and_is_not_chosen_gets_qemu(run):
    elsewhere = f"/opt/other/{Path(OURS).name}".encode()
    text = LIBVIRT.replace(QEMU.encode(), elsewhere)
    assert emulators(run("guests = []", text)[0]) == [QEMU]
    assert emulators(run('guests = []\nqemu = "qemu-here"', text)[0]) == ["/usr/bin/qemu-here"]
    out, _ = run('guests = []\nqemu = "/opt/qemu-here"', text)
    assert emulators(out) == ["/opt/qemu-here"]
    assert without_emulator(out) == without_emulator(LIBVIRT)


@pytest.mark.parametrize(
    ("settings", "text", "said"),
    [
        (None, b"", "no XML of a domain"),
        (None, LIBVIRT[:-12], "no XML of a domain"),
        (None, b"<network/>", "the root is not <domain>"),
        (None, b"\x00\xff", "no XML of a domain"),
        (None, LIBVIRT.replace(b"unit='KiB'", b"unit='parsec'"), "16384 parsec"),
        (None, b"<domain type='kvm'><devices/></domain>", "no <devices>"),
        ("guests = 1", LIBVIRT, "guests must be a list"),
        ("guests = [1]", LIBVIRT, "guests must be a list"),
        ("qemu = 1", LIBVIRT, "qemu must be a path"),
        ('least-memory = "lots"', LIBVIRT, "'lots' is no size"),
        ("least-memory = true", LIBVIRT, "is no size"),
        ("[hook", LIBVIRT, "sharded-pc.toml: "),
    ],
)
def test_what_cannot_be_read_or_done_leaves_the_domain_as_it_is(run, settings, text, said):
    out, complaint = run(settings, text)
    assert out == b""
    assert said in complaint
    assert len(complaint.splitlines()) == 1


def test_an_emulator_that_is_not_there_is_not_put_in(run, tmp_path):
    place = install_hook(Path("/no/such"), tmp_path)
    done = subprocess.run([place, *MIGRATE], input=LIBVIRT, capture_output=True, check=True)
    assert done.stdout == b""
    assert b"/no/such, which is no executable here" in done.stderr


def test_another_spelling_of_the_emulator_is_found(run):
    text = LIBVIRT.replace(QEMU.encode(), b"<!-- > --><![CDATA[/usr/bin/a&b]]>")
    out, _ = run(None, text)
    assert emulators(out) == [OURS]
    assert without_emulator(out) == without_emulator(LIBVIRT)


class TestKubeVirt:
    def start(self, text: bytes, vmi: object) -> tuple[bytes, str]:
        """As sidecar-shim does: `onDefineDomain --vmi JSON --domain XML`."""
        words = ["--vmi", json.dumps(vmi), "--domain", text]
        done = subprocess.run([sys.executable, hook.__file__, *words], capture_output=True, env={})
        assert done.returncode == 0
        return done.stdout, done.stderr.decode()

    @pytest.mark.parametrize(
        ("annotations", "emulator"),
        [
            (None, hook.EMULATOR),
            ({"other": "x"}, hook.EMULATOR),
            ({hook.ANNOTATION: "/a b"}, "/a b"),
        ],
    )
    def test_the_emulator_is_put_in(self, annotations, emulator):
        out, complaint = self.start(KUBEVIRT, {"metadata": {"annotations": annotations}})
        assert complaint == ""
        assert emulators(out) == [emulator]
        assert without_emulator(out) == without_emulator(KUBEVIRT)

    @pytest.mark.parametrize("vmi", [{}, [], {"metadata": {"annotations": []}}])
    def test_the_domain_is_printed_in_any_case(self, vmi):
        out, complaint = self.start(KUBEVIRT, vmi)
        assert out == KUBEVIRT or emulators(out) == [hook.EMULATOR]
        assert (out == KUBEVIRT) == bool(complaint)

    def test_no_xml_is_printed_as_it_is(self):
        out, complaint = self.start(b"<domain", {"metadata": {}})
        assert out == b"<domain"
        assert "no XML of a domain" in complaint


class TestInstall:
    def test_another_hook_stays(self, tmp_path):
        other = tmp_path / PLACE.replace("qemu.d/sharded-pc", "qemu")
        other.parent.mkdir(parents=True)
        other.write_text("#!/bin/sh\n")
        place = install_hook(Path(OURS), tmp_path)
        assert place == tmp_path / PLACE
        assert install_hook(Path('/a"b'), tmp_path) == place  # over the old one
        assert other.read_text() == "#!/bin/sh\n"
        assert [each.name for each in place.parent.iterdir()] == ["sharded-pc"]

    def test_says_what_it_could_not_do(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "etc").write_text("no folder")
        monkeypatch.setattr(install_hook, "__defaults__", (tmp_path,))
        assert main(["libvirt", "install-hook", "--emulator", "x"]) == 3
        assert "cannot install the hook" in capsys.readouterr().err
