#!/usr/bin/env python3
"""Prints what a handler costs the crate of a user, beside the same handler written by hand.

Writes crates with one handler and with many (`handler.rs`), each with its own job and its own error: with consumers as
in the README (`ours.rs`), and with a loop of its own for each (`by_hand.rs`). The cost of a handler is the difference
for each one more: in lines of LLVM IR, before LLVM optimizes them, and in bytes of machine code of a release build. The
time is that of the processor for a release build of the crate with 21 handlers alone, the least of some rounds that
alternate.

    benches/handlers/measure.py          # all of it
    benches/handlers/measure.py lines    # the lines alone

The crates are left in target/handlers, where `cargo llvm-lines --release --bin ours-6` tells which functions are large.
"""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SCRATCH = ROOT / "target" / "handlers"
SIDES = {"ours": [], "by_hand": ["broker"]}
# The lines grow evenly, and code that is not optimized takes long to compile.
ONE, SOME, MANY = 1, 6, 21
ROUNDS = 5

MANIFEST = """\
[package]
name = "{name}"
version = "0.0.0"
edition = "2024"
publish = false

[dependencies]
futures-util = "0.3.30"
lapin = {{ version = "4.12", default-features = false, features = ["tokio"] }}
serde = {{ version = "1", features = ["derive"] }}
serde_json = "1"
thiserror = "2"
tokio = {{ version = "1.50", features = ["full"] }}
tokio-util = "0.7.14"
tower = {{ version = "0.5.2", features = ["util"] }}
tracing = "0.1"
"""
OURS = """\
tower-sentinel = {{ path = "{root}", features = ["json", "rabbitmq"] }}
"""

MAIN = """\
use std::{{error::Error, future::Future, pin::Pin}};

use tokio_util::sync::CancellationToken;

{modules}
pub type BoxError = Box<dyn Error + Send + Sync>;

type Consumer = Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>>;

#[tokio::main]
async fn main() {{
    let shutdown = CancellationToken::new();
    let mut running = tokio::task::JoinSet::<Result<(), BoxError>>::new();
    let consumers: Vec<Consumer> = vec![
{consumers}    ];
    consumers.into_iter().for_each(|consumer| drop(running.spawn(consumer)));
    tokio::signal::ctrl_c().await.expect("ctrl-c can be waited for");
    shutdown.cancel();
    running.join_all().await;
}}
"""


def write(path, text):
    """Leaves a file alone that would not change, so that cargo does not compile it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def write_crate(side, handlers):
    name = f"{side}-{handlers}"
    crate = SCRATCH / name
    manifest = MANIFEST + OURS if side == "ours" else MANIFEST
    write(crate / "Cargo.toml", manifest.format(name=name, root=ROOT))
    for module in SIDES[side]:
        write(crate / "src" / f"{module}.rs", (HERE / f"{module}.rs").read_text())
    modules, consumers = list(SIDES[side]), []
    for number in range(1, handlers + 1):
        for source, module in ("handler", f"handler_{number}"), (side, f"consumer_{number}"):
            code = (HERE / f"{source}.rs").read_text().replace("NUMBER", str(number))
            write(crate / "src" / f"{module}.rs", code)
            modules.append(module)
        consumers.append(f"Box::pin(consumer_{number}::consume(shutdown.clone())),")
    main = MAIN.format(
        modules="".join(f"mod {module};\n" for module in modules),
        consumers="".join(f"        {consumer}\n" for consumer in consumers),
    )
    write(crate / "src" / "main.rs", main)


def cargo(command, *arguments):
    run = ["cargo", command, "--quiet", *arguments]
    # Its own workspace has its own target folder, whatever the caller's is.
    env = {**os.environ, "CARGO_TARGET_DIR": str(SCRATCH / "target")}
    subprocess.run(run, cwd=SCRATCH, env=env, check=True)


def lines(side, handlers):
    """Returns the number of lines in the functions of the crate, as `cargo llvm-lines` counts them."""
    name = f"{side}-{handlers}"
    out = SCRATCH / f"{name}.ll"
    cargo("rustc", "--release", "--package", name, "--", f"--emit=llvm-ir={out}",
          "-Cno-prepopulate-passes", "-Ccodegen-units=1", "-Clinker=true")
    count, inside = 0, False
    for line in out.read_text().splitlines():
        inside = line != "}" and (inside or line.startswith("define "))
        count += inside and line.startswith("  ")
    return count


def text(side, handlers):
    """Returns the size of the program's machine code."""
    name = f"{side}-{handlers}"
    cargo("build", "--release", "--package", name)
    sections = subprocess.run(["size", "-A", SCRATCH / "target" / "release" / name],
                              check=True, capture_output=True, text=True)
    return int(re.search(r"^\.text\s+(\d+)", sections.stdout, re.M)[1])


def seconds(side):
    """Returns the time that a build of the crate takes, its dependencies apart."""
    name = f"{side}-{MANY}"
    (SCRATCH / name / "src" / "main.rs").touch()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    cargo("build", "--release", "--package", name)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def each(measure, side, handlers):
    return (measure(side, handlers) - measure(side, ONE)) / (handlers - ONE)


def compare(what, measure):
    ours, by_hand = (measure(side) for side in SIDES)
    print(f"{what:<24} {ours:>9,.6g} / {by_hand:>9,.6g}   {ours / by_hand:.2f}", flush=True)


def main():
    crates = [(side, handlers) for side in SIDES for handlers in (ONE, SOME, MANY)]
    for crate in crates:
        write_crate(*crate)
    members = ", ".join(f'"{side}-{handlers}"' for side, handlers in crates)
    write(SCRATCH / "Cargo.toml", f'[workspace]\nmembers = [{members}]\nresolver = "3"\n')
    lock = SCRATCH / "Cargo.lock"
    if not lock.exists():
        write(lock, (ROOT / "Cargo.lock").read_text())

    print("of a handler                  ours /   by hand   ratio")
    compare("lines of LLVM IR", lambda side: each(lines, side, SOME))
    if sys.argv[1:] == ["lines"]:
        return
    compare("bytes of machine code", lambda side: each(text, side, MANY))
    rounds = [{side: seconds(side) for side in SIDES} for _ in range(ROUNDS)]
    compare(f"seconds to build {MANY}", lambda side: min(times[side] for times in rounds))


if __name__ == "__main__":
    main()
