//! What a link needs of TCP.

use std::io;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// Bytes that may wait in the socket beyond those on their way. What is written later, a heartbeat or an acknowledgement, waits
/// behind these at most: 128 KiB are 10 ms at 100 Mbit/s. Without it the kernel takes megabytes, whatever the network does.
const NOT_SENT: u32 = 128 * 1024;

/// After which time without acknowledgement TCP gives a connection up. The link's own detection is much quicker; this is for what
/// nobody watches any more, and longer than any network's hiccup that a protection should survive.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

/// Sets a connection up. Its buffers stay the kernel's own to size: a fixed size switches that off and is capped at
/// `net.core.wmem_max`, 208 KiB on Debian, too little for a fast or a long network.
pub(super) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_notsent_lowat(NOT_SENT)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    // Only a connection that sends nothing needs probes: one of a handshake, or of a peer that is stopped.
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5)).with_retries(3),
    )
}
