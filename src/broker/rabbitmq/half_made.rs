//! [`HalfMade`]: a connection that may be given up before it is made.

#[cfg(unix)]
use std::os::fd::AsFd as AsSocket;
#[cfg(windows)]
use std::os::windows::io::AsSocket;
use std::{
    io,
    net::{Shutdown, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lapin::{
    Connection, ConnectionProperties, Error, Result,
    runtime::default_runtime,
    tcp::{AsyncTcpStream, TLSConfig},
    uri::{AMQPScheme, AMQPUri},
};

/// Closes the connection when it is dropped before there is one.
///
/// A thread of lapin's own makes the connection, and goes on when nobody waits for it any more: if
/// the server is silent, then for ever.
pub(super) struct HalfMade(Arc<Mutex<Progress>>);

enum Progress {
    /// With the socket, once there is one.
    Making(Option<TcpStream>),
    /// The socket is let go: as long as it is held, it is not closed when lapin drops its own.
    Made,
    GivenUp,
}

impl HalfMade {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Progress::Making(None))))
    }

    /// Connects as lapin does.
    pub(super) async fn connect(
        &self,
        uri: AMQPUri,
        properties: ConnectionProperties,
    ) -> Result<Connection> {
        let progress = Arc::clone(&self.0);
        let runtime = default_runtime()?;
        let reactor = runtime.clone();
        let tcp = async move |uri: AMQPUri, _| {
            let host = uri.authority.host.clone();
            let addresses = reactor.to_socket_addrs((host.clone(), uri.authority.port));
            let stream = AsyncTcpStream::connect(&reactor, addresses).await?;
            if let AsyncTcpStream::Plain(plain) = &stream {
                hold(&progress, plain.get_ref())?;
            }
            match uri.scheme {
                AMQPScheme::AMQP => Ok(stream),
                AMQPScheme::AMQPS => Ok(stream.into_tls(&host, TLSConfig::default()).await?),
            }
        };
        let connection = Connection::connector(uri, runtime, tcp, properties).await?;
        *lock(&self.0) = Progress::Made;
        Ok(connection)
    }
}

impl Drop for HalfMade {
    fn drop(&mut self) {
        let mut progress = lock(&self.0);
        if let Progress::Making(socket) = &*progress {
            if let Some(socket) = socket {
                // An error says that it is closed already.
                drop(socket.shutdown(Shutdown::Both));
            }
            *progress = Progress::GivenUp;
        }
    }
}

fn hold(progress: &Mutex<Progress>, socket: &impl AsSocket) -> Result<()> {
    match &mut *lock(progress) {
        Progress::Making(held) => *held = Some(twin(socket)?),
        // lapin connects again by itself, where that is turned on.
        Progress::Made => {}
        Progress::GivenUp => return Err(Error::from(io::Error::from(io::ErrorKind::TimedOut))),
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
