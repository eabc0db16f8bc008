//! README code that needs features is an example, which is compiled with them.

#[test]
fn the_worker_of_the_readme_is_the_example_orders() {
    let example = include_str!("../../examples/orders.rs");
    let (_, code) = example.split_once("\n\n").unwrap();
    let block = format!("```rust,ignore\n{code}```\n");
    let readme = include_str!("../../README.md");
    assert!(readme.contains(&block), "the README has not:\n{block}");
}
