//! Connecting, with an error that names the address.

use std::sync::Arc;

use async_nats::{Client, ConnectErrorKind, ConnectOptions, ServerAddr};

use super::ConnectError;

/// Connects to the server at `address`, such as `nats://user:password@127.0.0.1:4222`.
///
/// The client reconnects by itself once it was connected. A user and a password in the address are
/// used, percent-encoded where they have to be; the client itself would ignore them.
///
/// # Errors
///
/// [`ConnectError`], if the address is not valid, nobody answers there, or the credentials are
/// refused. It is not tried again.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use tower_sentinel::broker::nats::{ConnectError, connect};
///
/// let error = connect("nats://user:secret@127.0.0.1:1").await.unwrap_err();
/// assert!(matches!(error, ConnectError::Unreachable { .. }));
/// assert!(error.to_string().starts_with("nats at 127.0.0.1:1 can't be reached: "));
/// # }
/// ```
pub async fn connect(address: &str) -> Result<Client, ConnectError> {
    connect_with(ConnectOptions::new(), address).await
}

/// Connects as [`connect`] does, with `options`: a token, TLS, the pause between reconnects.
///
/// # Errors
///
/// As for [`connect`]; and with
/// [`retry_on_initial_connect`](ConnectOptions::retry_on_initial_connect) none but an invalid
/// address.
pub async fn connect_with(options: ConnectOptions, address: &str) -> Result<Client, ConnectError> {
    let server = address.parse::<ServerAddr>();
    let server = server.map_err(|error| ConnectError::InvalidAddress(error.into()))?;
    let address = format!("{}:{}", server.host(), server.port());
    let options = match (server.username(), server.password()) {
        (Some(user), password) => {
            options.user_and_password(decode(user), decode(password.unwrap_or_default()))
        }
        (None, _) => options,
    };
    options.connect(server).await.map_err(|error| {
        let kind = error.kind();
        let error = Arc::new(error);
        match kind {
            ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                ConnectError::Denied { address, error }
            }
            _ => ConnectError::Unreachable { address, error },
        }
    })
}

/// Decodes the percent-encoding of a URL; what is not one stays as it is.
fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = match (first, tail) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)),
            _ => None,
        };
        match code {
            Some((high, low)) => {
                bytes.push(high * 16 + low);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    let value = char::from(digit).to_digit(16)?;
    u8::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::decode;

    #[test]
    fn a_password_is_decoded() {
        assert_eq!(decode("p%40ss%2fw%C3%A4"), "p@ss/w\u{e4}");
        assert_eq!(decode("100%"), "100%");
        assert_eq!(decode("%zz"), "%zz");
    }
}
