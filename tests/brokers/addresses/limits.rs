//! Servers that never respond.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use tokio::net::TcpSocket;

use super::BROKERS;
use crate::child::{Child, Ledger, setting};

/// Returns how many sockets, and threads of lapin, this process has.
fn left() -> (usize, usize) {
    let entries = |folder| fs::read_dir(folder).unwrap().flatten();
    let sockets = entries("/proc/self/fd")
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("socket:"));
    let threads = entries("/proc/self/task")
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .filter(|name| name.starts_with("lapin"));
    (sockets.count(), threads.count())
}

/// In its own process: other tests of this binary come and go with sockets.
#[test]
fn a_connect_that_tcp_does_not_answer_leaves_nothing_behind() {
    let test = "a_connect_that_tcp_does_not_answer_leaves_nothing_behind";
    if setting("SILENT").is_none() {
        let mut child = Child::start(module_path!(), test, &[("SILENT", "yes")]);
        child.end();
        assert_eq!(child.told("given").len(), BROKERS.len());
        return;
    }
    let ledger = Ledger::own();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let listener = socket.listen(1).unwrap();
        let place = listener.local_addr().unwrap();
        // Nobody accepts, so the kernel stops responding when the queue is full.
        let mut queue = Vec::new();
        while let Ok(one) = TcpStream::connect_timeout(&place, Duration::from_secs(1)) {
            queue.push(one);
        }
        let before = left();
        for broker in BROKERS {
            let address = broker.address(false, &format!("user:s3cr3t@{place}"));
            let error = broker.connect(&address).await.unwrap_err();
            assert!(error.contains(&place.to_string()), "{error}");
            ledger.write("given", "up");
        }
        // The kernel tries for two minutes.
        for _ in 0..400 {
            if left() == before {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
        panic!("sockets and threads: {:?}, and {before:?} before", left());
    });
}
