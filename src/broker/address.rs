//! Addresses of servers, which may contain a password and so are never repeated.

/// Mistake of an address that is split in the middle of its password.
pub(super) const SPLIT: &str = "an `@` comes after the host; \
    `/`, `?`, `#` and `@` are %2F, %3F, %23 and %40 in a user, a password and what follows the host";

/// Returns whether an `@` comes after the end of the host.
///
/// A `/`, `?` or `#` ends the host. So if a password contains one of them unescaped, the user is taken for
/// the host, and the beginning of the password for the port.
pub(super) fn is_split(address: &str) -> bool {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    rest[end..].contains('@')
}

/// Returns host and port as one text, with the brackets that IPv6 needs.
pub(super) fn place(host: &str, port: u16) -> String {
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{is_split, place};

    #[test]
    fn a_password_that_ends_the_host_is_found() {
        for sign in ["/", "?", "#"] {
            assert!(is_split(&format!("amqp://user:12{sign}34@host:5672/%2f")));
            assert!(is_split(&format!("user:12{sign}34@host")));
            assert!(is_split(&format!("nats://12{sign}34@host")));
            assert!(is_split(&format!("redis://user:1@2{sign}34@host")));
        }
        for whole in [
            "amqp://user:12%2F34@host:5672/%2f?heartbeat=1",
            "amqp://guest:guest@host//",
            "amqp://user:1@2@host/vhost",
            "host:4222",
            "rediss://:secret@[::1]:6379/0#insecure",
            "redis://host/0",
        ] {
            assert!(!is_split(whole), "{whole}");
        }
    }

    #[test]
    fn an_ipv6_address_has_brackets() {
        assert_eq!(place("::1", 5672), "[::1]:5672");
        assert_eq!(place("localhost", 5672), "localhost:5672");
    }
}
