//! The items of the API, and the crates that they name.

use std::collections::BTreeSet;

use public_api::{Builder, PublicApi};

use crate::{RUSTDOC_JSON, readme, root};

fn api() -> PublicApi {
    Builder::from_rustdoc_json(&*RUSTDOC_JSON)
        .omit_auto_derived_impls(true)
        .omit_auto_trait_impls(true)
        .omit_blanket_impls(true)
        .build()
        .expect("rustdoc's JSON is that of Rust 1.95")
}

/// `UPDATE_SNAPSHOTS=yes` writes the present one, whose changes are for the review.
#[test]
#[ignore = "wants rustdoc of Rust 1.95"]
fn the_items_are_those_of_the_snapshot() {
    api().assert_eq_or_update(root().join("tests/api/public.txt"));
}

/// A new major version of one of these is one of this crate.
#[test]
#[ignore = "wants rustdoc of Rust 1.95"]
fn the_crates_in_the_api_are_those_of_the_readme() {
    let of_rust = ["alloc", "core", "std", "tower_sentinel"];
    let items: Vec<_> = api().items().map(ToString::to_string).collect();
    // No program can name what is private to a macro.
    let items = items.iter().filter(|it| !it.contains("::__private::"));
    let is_of_path = |it: char| it.is_alphanumeric() || matches!(it, '_' | ':');
    let found: BTreeSet<_> = items
        .flat_map(|item| item.split(|it| !is_of_path(it)))
        .filter_map(|path| path.split_once("::"))
        .map(|(first, _)| first)
        .filter(|it| it.starts_with(|it: char| it.is_lowercase()) && !of_rust.contains(it))
        .map(|it| it.replace('_', "-"))
        .collect();

    let readme = readme();
    let (_, section) = readme
        .split_once("\n## Versions\n")
        .expect("the README has the section");
    let list = section.split("\n\n").nth(1).expect("a paragraph is there");
    let named: BTreeSet<_> = list
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect();
    assert_eq!(found, named, "found and named in the README");
}
