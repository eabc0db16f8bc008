//! Examples of what users build with.

use std::{collections::BTreeSet, fs, iter};

use rustdoc_types::{Crate, Id, Item, ItemEnum, Type, Visibility};

use crate::RUSTDOC_JSON;

/// Types and traits of which each function is shown, beside the builders.
const SHOWN: [&str; 6] = [
    "Consumer",
    "ConsumerError",
    "ReconnectingConsumer",
    "Settle",
    "Subscription",
    "Watch",
];

fn is_self(of: Option<&Type>) -> bool {
    matches!(of, Some(Type::Generic(name)) if name == "Self")
}

/// The code in the documentation of an item.
fn code(item: &Item) -> String {
    let docs = item.docs.as_deref().unwrap_or_default();
    docs.split("```").skip(1).step_by(2).collect()
}

/// The functions of a type's own `impl`s, or of a trait.
fn functions<'a>(krate: &'a Crate, item: &'a Item) -> Vec<&'a Item> {
    let own = |id: &Id| match &krate.index[id].inner {
        ItemEnum::Impl(it) if it.trait_.is_none() => it.items.clone(),
        _ => Vec::new(),
    };
    let ids = match &item.inner {
        ItemEnum::Struct(it) => it.impls.iter().flat_map(own).collect(),
        ItemEnum::Enum(it) => it.impls.iter().flat_map(own).collect(),
        ItemEnum::Trait(it) => it.items.clone(),
        _ => Vec::new(),
    };
    let items = ids.iter().filter_map(|id| krate.index.get(id));
    items
        .filter(|it| matches!(it.inner, ItemEnum::Function(_)))
        .collect()
}

/// Takes itself and returns itself, changed.
fn is_setter(item: &Item, of: &str) -> bool {
    let ItemEnum::Function(it) = &item.inner else {
        return false;
    };
    let is_of = |output: &Type| matches!(output, Type::ResolvedPath(path) if path.path == of);
    let output = it.sig.output.as_ref();
    let taken = it.sig.inputs.first();
    taken.is_some_and(|(name, of)| name == "self" && is_self(Some(of)))
        && (is_self(output) || output.is_some_and(is_of))
}

/// In an example of its own, of its type, or of another function there.
#[test]
#[ignore = "wants rustdoc of Rust 1.95"]
fn each_function_of_a_builder_is_shown() {
    let json = fs::read_to_string(&*RUSTDOC_JSON).expect("rustdoc wrote it");
    let krate: Crate = serde_json::from_str(&json).expect("it is that of Rust 1.95");
    let mut shown = BTreeSet::new();
    let mut missing = BTreeSet::new();
    for item in krate.index.values() {
        let Some(name) = &item.name else { continue };
        let functions = functions(&krate, item);
        let is_builder = functions.iter().any(|it| is_setter(it, name));
        if item.visibility != Visibility::Public || !(is_builder || SHOWN.contains(&&**name)) {
            continue;
        }
        let of_type = iter::once(item).chain(functions.iter().copied());
        let code: String = of_type.map(code).collect();
        for function in functions {
            let called = function.name.as_deref().expect("a function has a name");
            let path = format!("{name}::{called}");
            if code.contains(&format!("{called}(")) {
                shown.insert(path);
            } else {
                missing.insert(path);
            }
        }
    }
    assert!(shown.len() > 50, "only these were found: {shown:?}");
    assert!(missing.is_empty(), "no example calls {missing:#?}");
}
