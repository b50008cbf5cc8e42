//! The open TLS sessions of paired hosts, so that they end when a host is unpaired.

use std::collections::HashMap;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use socket2::{SockRef, Socket};
use tokio::net::TcpStream;

use super::certificate::HostId;

/// Most open sessions of one host, in both directions: two for each of a hundred guests.
const MAX_SESSIONS: usize = 256;

struct Open {
    host: HostId,
    cut: Arc<AtomicBool>,
    /// A second descriptor of the connection.
    socket: Socket,
}

#[derive(Default)]
struct Inner {
    next: u64,
    open: HashMap<u64, Open>,
}

/// All open sessions.
#[derive(Clone, Default)]
pub struct Sessions(Arc<Mutex<Inner>>);

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("open", &self.lock().open.len()).finish()
    }
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a connection until the guard is dropped.
    ///
    /// # Errors
    /// When the host has too many, or the descriptor cannot be doubled.
    pub(super) fn enter(&self, host: HostId, stream: &TcpStream) -> std::io::Result<SessionGuard> {
        let socket = SockRef::from(stream).try_clone()?;
        let cut = Arc::new(AtomicBool::new(false));
        let mut inner = self.lock();
        if inner.open.values().filter(|open| open.host == host).count() >= MAX_SESSIONS {
            return Err(std::io::Error::other(format!("{MAX_SESSIONS} sessions of this host are open already")));
        }
        let id = inner.next;
        inner.next += 1;
        inner.open.insert(id, Open { host, cut: cut.clone(), socket });
        drop(inner);
        Ok(SessionGuard { sessions: self.clone(), id, cut })
    }

    /// Ends all sessions of a host; what of them was received but not read yet is not given out any more. How many there were.
    pub(super) fn cut(&self, host: HostId) -> usize {
        let inner = self.lock();
        let mut count = 0;
        for open in inner.open.values().filter(|open| open.host == host) {
            open.cut.store(true, Ordering::SeqCst);
            // Wakes whoever waits to read or write. A connection that is gone already is as wished.
            let _ = open.socket.shutdown(Shutdown::Both);
            count += 1;
        }
        count
    }

    /// How many are open with a host.
    pub(super) fn count(&self, host: HostId) -> usize {
        self.lock().open.values().filter(|open| open.host == host).count()
    }
}

/// One listed session.
pub struct SessionGuard {
    sessions: Sessions,
    id: u64,
    cut: Arc<AtomicBool>,
}

impl std::fmt::Debug for SessionGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionGuard").field("id", &self.id).field("cut", &self.cut).finish()
    }
}

impl SessionGuard {
    /// Whether the host was unpaired meanwhile.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::SeqCst)
    }
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.sessions.lock().open.remove(&self.id);
    }
}
