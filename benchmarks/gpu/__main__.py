"""The driver of `make gpu`: the sections, one after the other, each within its time; exit code 1 if anything failed.

    python -m gpu [--minutes 9] [--results FOLDER] [--only SECTION ...] [--dry]

It prints its plan first: `schedule.PARTS`, with the seconds that each is given. A section that uses the card runs in a
process of its own: what breaks it, an illegal access or a signal, leaves the next one a card that works. A row that
breaks the card is recorded, and the section goes on behind it in a new process.
`--dry`: tiny shapes on the CPU, Triton in its interpreter, into a folder of its own: it shows that the code runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from gpu import check, counters, schedule, table
from gpu.section import AGAIN, BrokenDevice, OutOfTime, Section, limited

RESULTS = check.ROOT / "benchmarks" / "results"
SECTIONS = [part.name for part in schedule.PARTS]
TIMED = [name for name in schedule.ON_THE_CARD if name != "machine"]
PLANT = "MF_GPU_PLANT"  # a section named here fails: that such a failure is told is tested
ASK = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "gpu": torch.cuda.get_device_name(0) if cuda else None,
                  "capability": "%d.%d" % torch.cuda.get_device_capability(0) if cuda else None}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=schedule.MINUTES, help="for everything (9)")
    parser.add_argument("--results", type=Path, help="folder for the files (benchmarks/results/<device>)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="these sections")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: shows that the code runs")
    parser.add_argument("--section", choices=schedule.ON_THE_CARD, help=argparse.SUPPRESS)  # inside the process of one
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        sys.exit(run_here(options))
    sys.exit(drive(options))


def drive(options: argparse.Namespace) -> int:
    started = time.monotonic()
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    asked = ask(options.dry)
    folder = options.results or (Path(tempfile.mkdtemp(prefix="gpu-dry-")) if options.dry else RESULTS / asked["slug"])
    if options.dry and folder.resolve().is_relative_to(RESULTS):
        sys.exit(f"--results: a dry run writes nothing below {RESULTS}")
    options.results = folder.resolve()
    print(f"{asked['gpu'] or 'dry run on the CPU'}, torch {asked['torch']}: results in {folder}", flush=True)
    print("\n".join(schedule.told(options.minutes, options.only)), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end what was started
    timed = [name for name in options.only if name in TIMED]
    warm, to_warm = None, bool(timed) and find_spec("triton") is not None
    good = True
    for name in options.only:
        if to_warm and name != "machine":  # which times the host
            warm, to_warm = check.start([sys.executable, "-m", "gpu.warm"]), False
        if warm is not None and name in timed:  # nothing else may run beside what is timed
            code, said = check.finish(warm, left_of(started, options.minutes, "smoke"))
            print(f"-- compiled beforehand: {'stopped' if code is None else said.strip()[-1000:]}", flush=True)
            warm = None
        good = run_section(name, left_of(started, options.minutes, name), options, asked) and good
    print(table.render(folder))
    print(f"{'everything was right' if good else 'SOMETHING FAILED'}; {time.monotonic() - started:.0f} s; {folder}")
    return 0 if good else 1


def left_of(started: float, minutes: float, name: str) -> float:
    """Seconds until a section has to be done."""
    return max(5.0, started + schedule.ends(name, minutes) - time.monotonic())


def ask(dry: bool) -> dict[str, str | None]:
    """What torch of this Python sees. Leaves with the reason where there is nothing to measure."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{sys.executable} has no torch that imports, choose another with PYTHON=...:\n{done.stderr[-1000:]}")
    asked = json.loads(done.stdout)
    if asked["gpu"] is None and not dry:
        sys.exit(f"{sys.executable}: torch {asked['torch']} sees no CUDA device; DRY=1 shows that the code runs")
    return asked | {"slug": re.sub(r"[^a-z0-9]+", "-", (asked["gpu"] or "dry").lower()).strip("-")}


def run_section(name: str, seconds: float, options: argparse.Namespace, asked: dict[str, str | None]) -> bool:
    """One section within its time; whether all of it was right. Whatever happens is in its file."""
    print(f"-- {name}, {seconds:.0f} s at most", flush=True)
    (options.results / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
    parts: dict[str, Callable[[Section], None]] = {
        "build": lambda section: check.build(section, seconds, options.dry, asked["capability"]),
        "smoke": lambda section: check.smoke(section, seconds, options.dry),
        "counters": lambda section: counters.run(section, seconds, options.dry),
        "check": lambda section: check.check(section, seconds, options.dry),
    }
    if name in parts:
        section = Section(name, options.results, dry=options.dry, torch=asked["torch"], gpu=asked["gpu"])
        guarded(section, parts[name])
        return section.ok
    command = [sys.executable, "-m", "gpu", "--section", name, "--results", str(options.results)]
    command += ["--dry"] if options.dry else []
    ends, resume, code, said = time.monotonic() + seconds, [], AGAIN, ""
    while code == AGAIN and time.monotonic() < ends:
        left = ends - time.monotonic()
        code, said = check.run([*command, *resume, "--seconds", f"{left:.1f}"], left + 20)
        resume = ["--resume"]
    section = Section(name, options.results, resume=True, dry=options.dry, torch=asked["torch"], gpu=asked["gpu"])
    if code not in (0, 1, AGAIN):  # it could not say itself what happened
        section.error = (
            f"the section's process {'was stopped' if code is None else f'ended with code {code}'}:\n{said[-4000:]}"
        )
        section.save()
    return section.ok


def run_here(options: argparse.Namespace) -> int:
    """Inside the process of a section."""
    section = Section(options.section, options.results, resume=options.resume, dry=options.dry)
    device = "cpu" if options.dry else "cuda"

    def body(section: Section) -> None:
        import harness
        import torch

        from gpu import machine, models, operators, profile, sweep

        # float32 is float32: for whom TF32 will do there is bfloat16
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        if options.dry:
            torch.set_num_threads(1)
        section.header["environment"] = harness.environment(device) | machine.card(device)
        if options.section == "machine":
            machine.run(section, device)
        else:
            parts = {"profile": profile, "models": models, "operators": operators, "sweep": sweep}
            parts[options.section.removeprefix("more-")].run(section, device, options.dry)

    with limited(options.seconds):
        return guarded(section, body)


def guarded(section: Section, body: Callable[[Section], None]) -> int:
    """The body, and what ended it in the section's file."""
    section.error = None
    try:
        if section.header["section"] == os.environ.get(PLANT):
            raise RuntimeError(f"planted by {PLANT}")
        body(section)
    except OutOfTime:
        pass  # what it did not get to is left out, and says so
    except BrokenDevice:
        section.save()
        return AGAIN
    except Exception:  # noqa: BLE001 whatever it is, it is written down and the next section runs
        section.error = traceback.format_exc()
    section.save()
    return 0 if section.ok else 1


if __name__ == "__main__":
    main()
