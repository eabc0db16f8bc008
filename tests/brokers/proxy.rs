//! A TCP proxy in front of a server, which can hold up and cut the traffic.

use std::{
    future::pending,
    mem,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
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
    /// Connections that swallow all bytes.
    half_open: Mutex<Vec<Connections>>,
    swallowed: Swallowed,
    is_down: Arc<AtomicBool>,
    // Ends with the proxy.
    _accepting: JoinSet<()>,
}

/// Bytes whose next sender loses what it sends with them.
type Swallowed = Arc<Mutex<Option<&'static [u8]>>>;

/// The connections since the last cut.
struct Connections {
    running: JoinSet<()>,
    flow: watch::Sender<Flow>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Goes,
    /// Bytes of clients wait.
    Waits,
    /// Nothing arrives, and nobody is told.
    Nowhere,
}

impl Connections {
    fn new() -> Self {
        Self {
            running: JoinSet::new(),
            flow: watch::Sender::new(Flow::Goes),
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
        let swallowed = Swallowed::default();
        let is_down = Arc::new(AtomicBool::new(false));
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(
            listener,
            server,
            (refused, Arc::clone(&swallowed)),
            Arc::clone(&connections),
            Arc::clone(&is_down),
        ));
        Self {
            address,
            connections,
            half_open: Mutex::default(),
            swallowed,
            is_down,
            _accepting: accepting,
        }
    }

    /// `host:port`.
    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Holds up the bytes that clients send on the open connections.
    pub(crate) fn stall(&self) {
        self.lock().flow.send_replace(Flow::Waits);
    }

    /// Lets the open connections lose all bytes, in both directions, as half-open ones do. Later ones work.
    pub(crate) fn swallow(&self) {
        let open = mem::replace(&mut *self.lock(), Connections::new());
        open.flow.send_replace(Flow::Nowhere);
        self.half_open.lock().unwrap().push(open);
    }

    /// Loses `bytes` the next time that a client sends them, with whatever it sends in the same write.
    pub(crate) fn swallow_next(&self, bytes: &'static [u8]) {
        *self.swallowed.lock().unwrap() = Some(bytes);
    }

    /// Returns whether nothing is left to be swallowed.
    pub(crate) fn has_swallowed(&self) -> bool {
        self.swallowed.lock().unwrap().is_none()
    }

    /// Breaks the connections that there are.
    pub(crate) fn cut(&self) {
        *self.lock() = Connections::new();
    }

    /// Breaks the connections that there are, and each later one until [`up`](Self::up).
    pub(crate) fn down(&self) {
        self.is_down.store(true, Ordering::SeqCst);
        self.cut();
    }

    pub(crate) fn up(&self) {
        self.is_down.store(false, Ordering::SeqCst);
    }

    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap()
    }
}

async fn accept(
    listener: TcpListener,
    server: String,
    (refused, swallowed): (&'static [u8], Swallowed),
    connections: Arc<Mutex<Connections>>,
    is_down: Arc<AtomicBool>,
) {
    loop {
        let (client, _) = listener.accept().await.unwrap();
        // A server that is down is a connection that ends at once.
        let Ok(server) = TcpStream::connect(&server).await else {
            continue;
        };
        let mut connections = connections.lock().unwrap();
        if is_down.load(Ordering::SeqCst) {
            continue;
        }
        let [flow, back] = [(); 2].map(|()| connections.flow.subscribe());
        let swallowed = Arc::clone(&swallowed);
        connections.running.spawn(async move {
            let (from_client, to_client) = client.into_split();
            let (from_server, to_server) = server.into_split();
            tokio::select! {
                () = forward(from_server, to_client, None, back) => {}
                () = forward(from_client, to_server, Some((refused, swallowed)), flow) => {}
            }
        });
    }
}

/// Forwards bytes; those of a client with their special ones.
async fn forward(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    of_client: Option<(&[u8], Swallowed)>,
    mut flow: watch::Receiver<Flow>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let sent = &buffer[..read];
        if let Some((refused, swallowed)) = &of_client {
            let is_refused = !refused.is_empty() && has(sent, refused);
            if is_refused || flow.wait_for(|flow| *flow != Flow::Waits).await.is_err() {
                return;
            }
            let is_lost = |bytes: &mut &'static [u8]| has(sent, bytes);
            if swallowed.lock().unwrap().take_if(is_lost).is_some() {
                continue;
            }
        }
        if *flow.borrow() != Flow::Nowhere && to.write_all(sent).await.is_err() {
            break;
        }
    }
    // Nobody is told of the end either.
    if *flow.borrow() == Flow::Nowhere {
        pending::<()>().await;
    }
}

fn has(sent: &[u8], bytes: &[u8]) -> bool {
    sent.windows(bytes.len()).any(|part| part == bytes)
}
