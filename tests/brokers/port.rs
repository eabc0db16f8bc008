//! Ports for private servers.

use std::net::TcpListener;

/// Returns a port where nobody listens.
///
/// It is below those that the kernel gives to connections: one of these could have it before the server listens.
pub(crate) fn free_port() -> u16 {
    loop {
        let port = fastrand::u16(10_000..32_768);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
