//! The table of the guide.

use std::collections::BTreeSet;

use crate::worker::Isolation;

const PAGE: &str = include_str!("../../src/_guide/isolation.md");

/// What a job does: the start of a row.
pub(crate) const FAILS: &str = "returns an error, or panics";
pub(crate) const HANGS: &str = "hangs at an `.await`";
pub(crate) const BLOCKS: &str = "blocks its thread, or never yields";
pub(crate) const ABORTS: &str = "calls `abort`, overflows its stack, crashes in a C library";
pub(crate) const PANICS_TWICE: &str = "panics while it panics, or under `panic = \"abort\"`";
pub(crate) const EXITS: &str = "calls `exit`";
pub(crate) const ALLOCATES: &str = "uses all memory";
pub(crate) const FORKS: &str = "starts other processes";
pub(crate) const LEAKS: &str = "leaks memory or files";
pub(crate) const BURNS: &str = "uses too much CPU time";
pub(crate) const IS_KILLED: &str = "runs when the worker is killed (SIGKILL)";
pub(crate) const SHARES: &str = "shares memory with others";

/// Returns the cells of each row, without the addresses of links.
fn rows() -> Vec<Vec<String>> {
    // The first one of the page.
    let lines = PAGE.lines().skip_while(|line| !line.starts_with('|'));
    let rows = lines.take_while(|line| line.starts_with('|'));
    let rows = rows.map(|row| {
        let cells = row.trim_matches('|').split(" | ");
        Vec::from_iter(cells.map(|cell| plain(cell.trim())))
    });
    // The heads, and the line below them.
    rows.skip(2).collect()
}

/// Returns a text without the addresses of its links.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, link)) = rest.split_once("](") {
        plain.push_str(&before.replacen('[', "", 1));
        rest = link.split_once(')').unwrap().1;
    }
    plain + rest
}

/// Checks what the table says.
#[track_caller]
pub(crate) fn says(row: &str, isolation: Isolation, text: &str) {
    let rows = rows();
    let cells = rows.iter().find(|cells| cells[0] == row).unwrap();
    assert_eq!(cells[1 + isolation as usize], text, "{row}, {isolation:?}");
}

#[test]
fn each_row_of_the_table_has_tests() {
    let rows = rows();
    let found: BTreeSet<_> = rows.iter().map(|cells| &*cells[0]).collect();
    let tested = [
        FAILS,
        HANGS,
        BLOCKS,
        ABORTS,
        PANICS_TWICE,
        EXITS,
        ALLOCATES,
        BURNS,
        FORKS,
        LEAKS,
        IS_KILLED,
        SHARES,
    ];
    assert_eq!(found, BTreeSet::from(tested));
    assert!(rows.iter().all(|cells| cells.len() == 4));
}
