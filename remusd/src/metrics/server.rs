//! The smallest HTTP server (RFC 9112) that a monitoring system can ask: `GET /metrics`, one answer, the end of the connection.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::ops::Backoff;

/// What the answer is.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Questions at a time; the others wait.
const AT_ONCE: usize = 8;

/// A question and its answer have this long.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longest question, in bytes.
const MAX_QUESTION: usize = 8 << 10;

/// Listens, now: an address that is taken is an error here and not later. For use within the runtime.
///
/// # Errors
/// What the system says.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = std::net::TcpListener::bind(address)?;
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket)
}

/// Answers for ever.
pub async fn serve<F, T>(listener: TcpListener, text: F)
where
    F: Fn() -> T + Clone + Send + 'static,
    T: Future<Output = String> + Send,
{
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let Ok(mut backoff) = Backoff::endless(Duration::from_millis(10), Duration::from_secs(1)) else { return };
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                backoff.reset();
                let text = text.clone();
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(PATIENCE, answer(stream, text)).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!("metrics: {error}");
                let _ = backoff.wait().await;
            }
        }
    }
}

async fn answer<F, T>(mut stream: TcpStream, text: F) -> std::io::Result<()>
where
    F: Fn() -> T,
    T: Future<Output = String>,
{
    let mut question = Vec::new();
    while !question.windows(4).any(|end| end == b"\r\n\r\n") {
        if question.len() > MAX_QUESTION || stream.read_buf(&mut question).await? == 0 {
            return Ok(());
        }
    }
    let first = question.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = first.split(|byte| *byte == b' ');
    let (status, kind, body) = match (words.next(), words.next()) {
        (Some(b"GET"), Some(path)) if path == b"/metrics" || path.starts_with(b"/metrics?") => {
            ("200 OK", CONTENT_TYPE, text().await)
        }
        (Some(b"GET"), _) => ("404 Not Found", "text/plain", "The figures are at /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "text/plain", "Only GET\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nAllow: GET\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.shutdown().await
}
