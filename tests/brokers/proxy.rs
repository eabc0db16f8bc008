//! A TCP proxy in front of a server, which can hold up and cut the traffic.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinSet,
};

/// Forwards connections to a server until it is dropped, which cuts them all.
pub(crate) struct Proxy {
    address: SocketAddr,
    connections: Arc<Mutex<Connections>>,
    // Ends with the proxy.
    _accepting: JoinSet<()>,
}

/// The connections since the last cut.
struct Connections {
    running: JoinSet<()>,
    stalled: watch::Sender<bool>,
}

impl Connections {
    fn new() -> Self {
        Self {
            running: JoinSet::new(),
            stalled: watch::Sender::new(false),
        }
    }
}

impl Proxy {
    pub(crate) async fn start(server: String) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        Self::at(listener, server)
    }

    /// Returns the number of connections since the last cut.
    pub(crate) fn taken(&self) -> usize {
        self.lock().running.len()
    }

    /// Takes the connections that come in at `listener`.
    pub(crate) fn at(listener: TcpListener, server: String) -> Self {
        Self::forwarding(listener, server, b"")
    }

    /// Cuts each connection that sends `request`, which the server does not get.
    pub(crate) async fn without(request: &'static [u8], server: String) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        Self::forwarding(listener, server, request)
    }

    fn forwarding(listener: TcpListener, server: String, refused: &'static [u8]) -> Self {
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(Mutex::new(Connections::new()));
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, server, refused, Arc::clone(&connections)));
        Self {
            address,
            connections,
            _accepting: accepting,
        }
    }

    /// `host:port`.
    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Holds up the bytes that clients send on the open connections.
    pub(crate) fn stall(&self) {
        self.lock().stalled.send_replace(true);
    }

    /// Breaks the connections that there are.
    pub(crate) fn cut(&self) {
        *self.lock() = Connections::new();
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap()
    }
}

async fn accept(
    listener: TcpListener,
    server: String,
    refused: &'static [u8],
    connections: Arc<Mutex<Connections>>,
) {
    loop {
        let (client, _) = listener.accept().await.unwrap();
        // A server that is down is a connection that ends at once.
        let Ok(server) = TcpStream::connect(&server).await else {
            continue;
        };
        let mut connections = connections.lock().unwrap();
        let stalled = connections.stalled.subscribe();
        connections.running.spawn(async move {
            let (from_client, mut to_client) = client.into_split();
            let (mut from_server, to_server) = server.into_split();
            tokio::select! {
                _ = copy(&mut from_server, &mut to_client) => {}
                () = forward(from_client, to_server, refused, stalled) => {}
            }
        });
    }
}

async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    refused: &[u8],
    mut stalled: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let sent = &buffer[..read];
        let is_refused =
            !refused.is_empty() && sent.windows(refused.len()).any(|part| part == refused);
        if is_refused || stalled.wait_for(|stalled| !stalled).await.is_err() {
            return;
        }
        if to.write_all(sent).await.is_err() {
            return;
        }
    }
}
