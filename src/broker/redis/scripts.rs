//! Lua scripts, each of which changes several structures at once, or nothing.

use std::sync::LazyLock;

use ::redis::Script;

macro_rules! settling {
    ($file:literal) => {
        LazyLock::new(|| {
            Script::new(concat!(
                include_str!("scripts/owned.lua"),
                include_str!(concat!("scripts/", $file))
            ))
        })
    };
}

pub(super) static ACK: LazyLock<Script> = LazyLock::new(|| {
    Script::new(concat!(
        include_str!("scripts/done.lua"),
        include_str!("scripts/ack.lua")
    ))
});
pub(super) static PARK: LazyLock<Script> = settling!("park.lua");
pub(super) static NACK: LazyLock<Script> = settling!("nack.lua");
pub(super) static DEAD_LETTER: LazyLock<Script> = LazyLock::new(|| {
    Script::new(concat!(
        include_str!("scripts/owned.lua"),
        include_str!("scripts/done.lua"),
        include_str!("scripts/dead_letter.lua")
    ))
});
pub(super) static KEEP_ALIVE: LazyLock<Script> = settling!("keep_alive.lua");

pub(super) static TAKE_DUE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("scripts/take_due.lua")));
pub(super) static RECLAIM: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("scripts/reclaim.lua")));
pub(super) static COUNTS: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("scripts/counts.lua")));
pub(super) static GIVE_BACK: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("scripts/give_back.lua")));

pub(super) static REDRIVE: LazyLock<Script> =
    LazyLock::new(|| Script::new(include_str!("scripts/redrive.lua")));
