//! A TCP proxy that can swallow what passes, in either direction, without closing anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

#[derive(Default)]
struct Muted {
    replies: AtomicBool,
    requests: AtomicBool,
}

pub(super) struct Proxy {
    port: u16,
    muted: Arc<Muted>,
    task: JoinHandle<()>,
}

async fn pump(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    muted: impl Fn() -> bool,
) -> std::io::Result<()> {
    let mut buffer = [0; 16384];
    let mut broken = false;
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.shutdown().await;
        }
        // Once something was swallowed, what follows on this connection would make no sense.
        broken |= muted();
        if !broken {
            to.write_all(&buffer[..n]).await?;
        }
    }
}

impl Proxy {
    pub(super) async fn start(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let muted = Arc::new(Muted::default());
        let (flags, target) = (muted.clone(), target.to_owned());
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (flags, target) = (flags.clone(), target.clone());
                tokio::spawn(async move {
                    let Ok(far) = TcpStream::connect(&target).await else { return };
                    let ((nr, nw), (fr, fw)) = (near.into_split(), far.into_split());
                    let _ = tokio::join!(
                        pump(nr, fw, || flags.requests.load(Ordering::SeqCst)),
                        pump(fr, nw, || flags.replies.load(Ordering::SeqCst)),
                    );
                });
            }
        });
        Self { port, muted, task }
    }

    pub(super) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(super) fn mute(&self, replies: bool, requests: bool) {
        self.muted.replies.store(replies, Ordering::SeqCst);
        self.muted.requests.store(requests, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}
