//! The oldest Rust that each feature wants.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    process::Command,
};

use serde_json::Value;

use crate::{readme, root};

/// `major.minor`, which can be compared.
type Version = (u32, u32);

fn version(text: &str) -> Version {
    let mut parts = text.split('.').map(|it| it.parse().expect("a number"));
    let (major, minor) = (parts.next(), parts.next());
    (major.expect("a major version"), minor.unwrap_or(0))
}

fn str_of<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().expect("cargo says it")
}

/// The newest of the versions that the crate and its dependencies want, those of Cargo.lock.
fn wanted(features: &str) -> Version {
    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(root())
        .args(["metadata", "--locked", "--format-version", "1"])
        .args(["--features", features])
        .output()
        .expect("cargo starts");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let array = |value: &Value| value.as_array().expect("cargo lists them").clone();
    let packages: BTreeMap<_, _> = array(&metadata["packages"])
        .into_iter()
        .map(|it| (str_of(&it, "id").to_owned(), it))
        .collect();
    let nodes: BTreeMap<_, _> = array(&metadata["resolve"]["nodes"])
        .into_iter()
        .map(|it| (str_of(&it, "id").to_owned(), it))
        .collect();

    let own = packages
        .values()
        .find(|it| str_of(it, "name") == "tower-sentinel");
    let mut open = vec![str_of(own.expect("it is there"), "id").to_owned()];
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        let needed = array(&nodes[&id]["deps"]).into_iter().filter(|it| {
            let kinds = array(&it["dep_kinds"]);
            kinds.iter().any(|it| it["kind"].as_str() != Some("dev"))
        });
        if seen.insert(id.clone()) {
            open.extend(needed.map(|it| str_of(&it, "pkg").to_owned()));
        }
    }
    let versions = seen
        .iter()
        .filter_map(|id| packages[id]["rust_version"].as_str());
    versions.map(version).max().expect("tokio wants one")
}

/// A toolchain may be missing, but what the dependencies say is there.
#[test]
fn each_feature_wants_the_rust_that_the_readme_says() {
    let readme = readme();
    let (_, section) = readme
        .split_once("\n## Minimum supported Rust version\n")
        .expect("the README has the section");
    let rows: Vec<_> = section
        .lines()
        .skip_while(|it| !it.starts_with("| ---"))
        .skip(1)
        .take_while(|it| it.starts_with('|'))
        .map(|row| row.trim_matches('|').split_once('|').expect("two columns"))
        .collect();
    assert!(rows.len() > 1, "the table has rows");

    for (features, said) in rows {
        let names = features.split('`').skip(1).step_by(2);
        let names = names.map(|it| if it == "default" { "" } else { it });
        for name in names {
            assert_eq!(
                wanted(name),
                version(said.trim()),
                "of the feature `{name}`"
            );
        }
    }
}
