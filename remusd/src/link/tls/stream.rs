//! A TLS stream that ends when its peer is unpaired.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::pair::sessions::SessionGuard;

/// An authenticated stream.
#[derive(Debug)]
pub(super) struct PeerStream {
    pub(super) tls: TlsStream<TcpStream>,
    pub(super) session: SessionGuard,
}

impl PeerStream {
    fn check(&self) -> io::Result<()> {
        if self.session.is_cut() {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the peer's host was unpaired"));
        }
        Ok(())
    }

    /// What TLS gave, unless it came about by the unpairing.
    fn after<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match polled {
            Poll::Pending => Poll::Pending,
            Poll::Ready(result) => Poll::Ready(self.check().and(result)),
        }
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        let polled = Pin::new(&mut self.tls).poll_read(cx, buf);
        self.after(polled)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check()?;
        let polled = Pin::new(&mut self.tls).poll_write(cx, bytes);
        self.after(polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check()?;
        let polled = Pin::new(&mut self.tls).poll_flush(cx);
        self.after(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
