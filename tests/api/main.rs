//! What the crate publishes: its API, the crates that are part of it, its examples, the Rust that it wants.
//!
//! Those that are ignored read what rustdoc of Rust 1.95 writes, which another version writes in another way:
//! `cargo test --all-features --test api -- --include-ignored`.
#![allow(missing_docs)]

mod examples;
mod msrv;
mod public;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
};

/// The root of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("there is a README")
}

/// What rustdoc says of the crate with all of its features.
static RUSTDOC_JSON: LazyLock<PathBuf> = LazyLock::new(|| {
    // Apart, since another compiler's settings would build all dependencies again, each time.
    let target = root().join("target/nightly");
    let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(root())
        .args(["rustdoc", "--quiet", "--locked", "--lib", "--all-features"])
        .arg("--target-dir")
        .arg(&target)
        .args(["--", "-Z", "unstable-options", "--output-format", "json"])
        // The format is a nightly's.
        .env("RUSTC_BOOTSTRAP", "1")
        .status()
        .expect("cargo starts");
    assert!(status.success(), "rustdoc fails: {status}");
    target.join("doc/tower_sentinel.json")
});
