//! [`HalfMade`]: a connection that can be given up before it is made.

#[cfg(unix)]
use std::os::fd::AsFd as AsSocket;
#[cfg(windows)]
use std::os::windows::io::AsSocket;
use std::{
    fmt, io,
    net::{Shutdown, SocketAddr, TcpStream},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::future::{Either, select};
use lapin::{
    Connection, ConnectionProperties, Error, Result,
    runtime::default_runtime,
    tcp::{AsyncTcpStream, OwnedTLSConfig},
    uri::{AMQPScheme, AMQPUri},
};
use tokio_util::sync::CancellationToken;

/// Guard that closes the connection if it is dropped before the connection is made.
///
/// One of lapin's threads makes the connection. It goes on when nobody waits for it any more, for ever if the
/// server is silent.
pub(super) struct HalfMade {
    progress: Arc<Mutex<Progress>>,
    /// Cancelled when the connection is given up: ends the handshakes of TCP and TLS.
    given_up: CancellationToken,
}

/// Error of a lapin that is built without TLS: it would go on in plain text.
#[derive(Debug)]
pub(super) struct NoTls;

impl fmt::Display for NoTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the client is built without tls")
    }
}

impl std::error::Error for NoTls {}

enum Progress {
    /// With the socket, once there is one.
    Making(Option<TcpStream>),
    /// The socket is dropped here: a handle that is held would keep it open after lapin drops its own.
    Made,
    GivenUp,
}

impl HalfMade {
    pub(super) fn new() -> Self {
        Self {
            progress: Arc::new(Mutex::new(Progress::Making(None))),
            given_up: CancellationToken::new(),
        }
    }

    /// Connects to a record of the host's name in the same way as lapin.
    pub(super) async fn connect(
        &self,
        record: SocketAddr,
        uri: AMQPUri,
        properties: ConnectionProperties,
        tls: OwnedTLSConfig,
    ) -> Result<Connection> {
        let progress = Arc::clone(&self.progress);
        let given_up = self.given_up.clone();
        let runtime = default_runtime()?;
        let reactor = runtime.clone();
        let tcp = async move |uri: AMQPUri, _| {
            let making = async {
                let stream = AsyncTcpStream::connect(&reactor, record).await?;
                if let AsyncTcpStream::Plain(plain) = &stream {
                    hold(&progress, plain.get_ref())?;
                }
                match uri.scheme {
                    AMQPScheme::AMQP => Ok(stream),
                    AMQPScheme::AMQPS => {
                        match stream.into_tls(&uri.authority.host, tls.as_ref()).await? {
                            AsyncTcpStream::Plain(_) => Err(Error::from(io::Error::other(NoTls))),
                            encrypted => Ok(encrypted),
                        }
                    }
                }
            };
            match select(pin!(given_up.cancelled()), pin!(making)).await {
                Either::Left(_) => Err(gone()),
                Either::Right((made, _)) => made,
            }
        };
        let connection = Connection::connector(uri, runtime, tcp, properties).await?;
        *lock(&self.progress) = Progress::Made;
        Ok(connection)
    }
}

impl Drop for HalfMade {
    fn drop(&mut self) {
        let mut progress = lock(&self.progress);
        if let Progress::Making(socket) = &*progress {
            if let Some(socket) = socket {
                // An error means that it is closed already.
                drop(socket.shutdown(Shutdown::Both));
            }
            *progress = Progress::GivenUp;
            self.given_up.cancel();
        }
    }
}

fn gone() -> Error {
    Error::from(io::Error::from(io::ErrorKind::TimedOut))
}

fn hold(progress: &Mutex<Progress>, socket: &impl AsSocket) -> Result<()> {
    match &mut *lock(progress) {
        Progress::Making(held) => *held = Some(twin(socket)?),
        // lapin connects again by itself, if that is turned on.
        Progress::Made => {}
        Progress::GivenUp => return Err(gone()),
    }
    Ok(())
}

fn lock(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(unix)]
fn twin(socket: &impl AsSocket) -> io::Result<TcpStream> {
    Ok(socket.as_fd().try_clone_to_owned()?.into())
}

#[cfg(windows)]
fn twin(socket: &impl AsSocket) -> io::Result<TcpStream> {
    Ok(socket.as_socket().try_clone_to_owned()?.into())
}
