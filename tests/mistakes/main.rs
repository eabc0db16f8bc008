//! Typical mistakes name their cause: the first line of the first error is the file's first line.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

const MANIFEST: &str = r#"
[package]
name = "mistakes"
version = "0.0.0"
edition = "2024"

[dependencies]
futures-util = "0.3.30"
tokio = { version = "1.44", features = ["macros", "rt-multi-thread"] }
tower = { version = "0.5.2", features = ["timeout", "util"] }
tower-sentinel = { path = "@" }

[workspace]
"#;

/// Makes a package of which each mistake is a program.
fn package(root: &Path) -> PathBuf {
    let package = root.join("target/mistakes");
    let programs = package.join("src/bin");
    // Programs of earlier runs, whose mistakes may be gone, must not stay.
    drop(fs::remove_dir_all(&programs));
    fs::create_dir_all(&programs).unwrap();
    let manifest = MANIFEST.replace('@', &root.display().to_string());
    fs::write(package.join("Cargo.toml"), manifest).unwrap();
    fs::copy(root.join("Cargo.lock"), package.join("Cargo.lock")).unwrap();
    for case in fs::read_dir(root.join("tests/mistakes/cases")).unwrap() {
        let case = case.unwrap();
        fs::copy(case.path(), programs.join(case.file_name())).unwrap();
    }
    package
}

/// Returns the first error of each program.
fn first_errors(package: &Path) -> BTreeMap<String, String> {
    let checked = Command::new(env!("CARGO"))
        // The flags of the person who runs the tests, such as `-D warnings`, are for this crate.
        .env_remove("RUSTFLAGS")
        .args(["check", "--quiet", "--offline", "--bins", "--keep-going"])
        .args(["--message-format", "json", "--target-dir", "target"])
        .current_dir(package)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let mut errors = BTreeMap::new();
    for line in String::from_utf8(checked.stdout).unwrap().lines() {
        let report: Value = serde_json::from_str(line).unwrap();
        let (message, program) = (&report["message"], &report["target"]["name"]);
        if report["reason"] != "compiler-message" || message["level"] != "error" {
            continue;
        }
        let rendered = message["rendered"].as_str().unwrap();
        let program = program.as_str().unwrap().to_owned();
        let first = rendered.lines().next().unwrap_or_default().to_owned();
        errors.entry(program).or_insert(first);
    }
    let stderr = String::from_utf8_lossy(&checked.stderr);
    assert!(!errors.is_empty(), "nothing was checked: {stderr}");
    errors
}

#[test]
fn each_mistake_names_its_cause() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let package = package(root);
    let mut errors = first_errors(&package);
    let mut cases = 0;
    for case in fs::read_dir(root.join("tests/mistakes/cases")).unwrap() {
        let path = case.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let code = fs::read_to_string(&path).unwrap();
        let expected = code.lines().next().unwrap().trim_start_matches("// ");
        let found = errors.remove(name).unwrap_or_else(|| "none".to_owned());
        assert_eq!(found, expected, "{name}");
        assert!(!found.contains("is not a future"), "{name}");
        cases += 1;
    }
    assert!(cases >= 16 && errors.is_empty(), "{errors:#?}");
}
