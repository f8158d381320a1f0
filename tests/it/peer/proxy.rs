//! A proxy between two nodes that counts, cuts, damages and freezes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What happens to what passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mischief {
    /// Nothing.
    None,
    /// Each connection is cut after at most so many bytes towards the client, anywhere.
    Cut { within: u64 },
    /// One bit is flipped in at most so many bytes towards the client.
    Flip { within: u64 },
    /// Nothing passes any more, and nothing is closed.
    Freeze,
    /// What a client sends with these words does not arrive, nor anything after it.
    Withhold(&'static str),
    /// Each connection is closed, open ones and new ones.
    Sever,
}

/// A running proxy; ends with the runtime, or when dropped.
pub struct Proxy {
    pub address: SocketAddr,
    /// Bytes that passed, both ways.
    pub passed: Arc<AtomicU64>,
    /// Connections that were cut or damaged.
    pub harmed: Arc<AtomicU64>,
    mischief: watch::Sender<Mischief>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    /// Starts one before `to`; positions of cuts and flips follow from `seed`.
    pub async fn start(to: SocketAddr, seed: u64) -> Proxy {
        Self::at("127.0.0.1:0", to, seed).await
    }

    /// Likewise, at an address of its own.
    pub async fn at(address: &str, to: SocketAddr, seed: u64) -> Proxy {
        let listener = TcpListener::bind(address).await.expect("binds");
        let address = listener.local_addr().expect("bound");
        let (passed, harmed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (mischief, watched) = watch::channel(Mischief::None);
        let counters = (Arc::clone(&passed), Arc::clone(&harmed));
        let task = tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(seed);
            loop {
                let Ok((client, _)) = listener.accept().await else { return };
                let (watched, counters, draw) = (watched.clone(), counters.clone(), random.random());
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(to).await else { return };
                    connection(client, server, watched, counters, draw).await;
                });
            }
        });
        Proxy { address, passed, harmed, mischief, task }
    }

    /// From now on, for open connections too.
    pub fn set(&self, mischief: Mischief) {
        self.mischief.send_replace(mischief);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn connection(
    client: TcpStream,
    server: TcpStream,
    mischief: watch::Receiver<Mischief>,
    (passed, harmed): (Arc<AtomicU64>, Arc<AtomicU64>),
    draw: u64,
) {
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = async {
        let mut buffer = vec![0_u8; 16 << 10];
        while let Ok(count @ 1..) = from_client.read(&mut buffer).await {
            thaw(&mischief).await;
            if let Mischief::Withhold(words) = *mischief.borrow()
                && buffer[..count].windows(words.len()).any(|sent| sent == words.as_bytes())
            {
                break;
            }
            passed.fetch_add(count as u64, Ordering::Relaxed);
            if to_server.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
        if matches!(*mischief.borrow(), Mischief::Withhold(_)) {
            harmed.fetch_add(1, Ordering::Relaxed);
            std::future::pending::<()>().await;
        }
    };
    let down = async {
        let (mut buffer, mut sent) = (vec![0_u8; 16 << 10], 0_u64);
        while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
            thaw(&mischief).await;
            passed.fetch_add(count as u64, Ordering::Relaxed);
            let now = *mischief.borrow();
            let place = match now {
                Mischief::None | Mischief::Freeze | Mischief::Withhold(_) | Mischief::Sever => None,
                Mischief::Cut { within } | Mischief::Flip { within } => (draw % within).checked_sub(sent),
            };
            let place = place.filter(|place| *place < count as u64).map(|place| place as usize);
            sent += count as u64;
            match (now, place) {
                (Mischief::Cut { .. }, Some(place)) => {
                    harmed.fetch_add(1, Ordering::Relaxed);
                    let _ = to_client.write_all(&buffer[..place]).await;
                    return;
                }
                (Mischief::Flip { .. }, Some(place)) => {
                    harmed.fetch_add(1, Ordering::Relaxed);
                    buffer[place] ^= 1 << (draw >> 61);
                }
                _ => {}
            }
            if to_client.write_all(&buffer[..count]).await.is_err() {
                return;
            }
        }
    };
    let severed = async { mischief.clone().wait_for(|mischief| *mischief == Mischief::Sever).await.is_ok() };
    tokio::select! { () = up => {}, () = down => {}, _ = severed => {} }
}

/// Returns once it is not frozen.
async fn thaw(mischief: &watch::Receiver<Mischief>) {
    let _ = mischief.clone().wait_for(|mischief| *mischief != Mischief::Freeze).await;
}
