//! A TCP proxy in front of a server, which can hold up and cut what goes through it.

use std::sync::{Arc, Mutex, MutexGuard};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
    sync::watch,
    task::JoinSet,
};

pub(crate) struct Proxy {
    pub(crate) port: u16,
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
    pub(crate) async fn start(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = Arc::new(Mutex::new(Connections::new()));
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, server, Arc::clone(&connections)));
        Self {
            port,
            connections,
            _accepting: accepting,
        }
    }

    /// Holds up what clients send on the connections that there are.
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

async fn accept(listener: TcpListener, server: u16, connections: Arc<Mutex<Connections>>) {
    loop {
        let (client, _) = listener.accept().await.unwrap();
        // A server that is down is a connection that ends at once.
        let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else {
            continue;
        };
        let mut connections = connections.lock().unwrap();
        let stalled = connections.stalled.subscribe();
        connections.running.spawn(async move {
            let (from_client, mut to_client) = client.into_split();
            let (mut from_server, to_server) = server.into_split();
            tokio::select! {
                _ = copy(&mut from_server, &mut to_client) => {}
                () = forward(from_client, to_server, stalled) => {}
            }
        });
    }
}

async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut stalled: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if stalled.wait_for(|stalled| !stalled).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
