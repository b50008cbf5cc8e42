//! The first frames: `HELLO` and its answer.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use super::{
    codec::{Decoder, Encoder},
    error::{CloseReason, FrameError, LinkError},
    frame::{Frame, Hello, Purpose, QueryEntry, RefuseCode, VersionRange, Welcome, capability, page_cache},
    pages::PageDecoder,
    session::{LinkOptions, Session},
    transport::Connection,
};
use crate::ids::{Nonce, ProtectionId, SessionKey};

/// Our software and its version, as told to peers.
#[must_use]
pub fn software() -> String {
    format!("remusd {}", env!("CARGO_PKG_VERSION"))
}

/// This host's name, as told to peers.
#[must_use]
pub fn host_name() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| "unknown host".to_owned())
}

/// A connection with its codec, before or between frames of the handshake.
struct Talk {
    connection: Connection,
    encoder: Encoder,
    decoder: Decoder,
}

impl Talk {
    async fn send(&mut self, frame: &Frame) -> Result<(), CloseReason> {
        let mut bytes = BytesMut::new();
        self.encoder.encode(frame, &mut bytes).map_err(CloseReason::Protocol)?;
        let sent = async {
            self.connection.writer.write_all(&bytes).await?;
            self.connection.writer.flush().await
        };
        sent.await.map_err(|e| CloseReason::Io(e.to_string()))
    }

    async fn receive(&mut self) -> Result<Frame, CloseReason> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(CloseReason::Protocol)? {
                return Ok(frame);
            }
            match self.connection.reader.read_buf(self.decoder.buffer()).await {
                Ok(0) => {
                    return Err(match self.decoder.finish() {
                        Ok(()) => CloseReason::Eof,
                        Err(error) => CloseReason::Protocol(error),
                    });
                }
                Ok(_) => {}
                Err(error) => return Err(CloseReason::Io(error.to_string())),
            }
        }
    }
}

/// Says `HELLO` and waits for the answer.
async fn greet(
    connection: Connection,
    peer: &str,
    key: SessionKey,
    purpose: Purpose,
    patience: Duration,
) -> Result<(Talk, Frame), LinkError> {
    let hello = Frame::Hello(Hello {
        versions: VersionRange::OURS,
        capabilities: capability::OURS,
        software: software(),
        host: host_name(),
        purpose,
    });
    let mut talk = Talk { connection, encoder: Encoder::new(key), decoder: Decoder::new(key) };
    let answer = tokio::time::timeout(patience, async {
        // A peer that refuses may have closed its end before it read everything: what it said counts more than our EPIPE.
        let mut sent = talk.send(&hello).await;
        loop {
            match (talk.receive().await, sent) {
                (Ok(Frame::Challenge { nonce }), Ok(())) => {
                    sent = talk.send(&Frame::ChallengeAnswer { nonce }).await;
                }
                (Err(CloseReason::Eof), Err(sent)) => break Err(sent),
                (answer, _) => break answer,
            }
        }
    })
    .await;
    match answer {
        Ok(Ok(Frame::Refuse { code, text })) => Err(LinkError::Refused { peer: peer.to_owned(), code, text }),
        Ok(Ok(Frame::Superseded { text })) => Err(LinkError::Superseded { peer: peer.to_owned(), text }),
        Ok(Ok(frame)) => Ok((talk, frame)),
        Ok(Err(reason)) => {
            let reason = with_last_words(reason, Connection::last_words(&mut talk.connection.child).await);
            Err(LinkError::Handshake { peer: peer.to_owned(), reason })
        }
        Err(_) => {
            let said = match &talk.connection.child {
                Some(child) => child.lines().last().map(|line| format!(": {line}")),
                None => None,
            };
            Err(LinkError::HandshakeTimeout { peer: peer.to_owned(), after: patience, said: said.unwrap_or_default() })
        }
    }
}

/// Adds what the transport process said to why the stream ended.
pub(super) fn with_last_words(why: CloseReason, said: Option<String>) -> CloseReason {
    match said {
        Some(said) => CloseReason::Transport { why: Box::new(why), said },
        None => why,
    }
}

/// Opens a session that protects.
pub(super) async fn connect(
    connection: Connection,
    peer: &str,
    key: SessionKey,
    purpose: Purpose,
    options: &LinkOptions,
) -> Result<(Session, Welcome), LinkError> {
    let (talk, answer) = greet(connection, peer, key, purpose, options.handshake_timeout).await?;
    let welcome = match answer {
        Frame::Welcome(welcome) => welcome,
        other => {
            return Err(LinkError::UnexpectedFrame { peer: peer.to_owned(), frame: other.name() });
        }
    };
    let ours = VersionRange::OURS;
    if welcome.version < ours.min || welcome.version > ours.max {
        return Err(LinkError::NoCommonVersion {
            peer: peer.to_owned(),
            theirs_min: welcome.version,
            theirs_max: welcome.version,
            ours_min: ours.min,
            ours_max: ours.max,
        });
    }
    let session = open(talk, welcome.version, None, options);
    Ok((session, welcome))
}

/// Asks a peer what it knows.
pub(crate) async fn query(
    connection: Connection,
    peer: &str,
    key: SessionKey,
    protection: Option<ProtectionId>,
    options: &LinkOptions,
) -> Result<Vec<QueryEntry>, LinkError> {
    let purpose = Purpose::Query { protection };
    let (_, answer) = greet(connection, peer, key, purpose, options.handshake_timeout).await?;
    match answer {
        Frame::QueryResult(entries) => Ok(entries),
        other => Err(LinkError::UnexpectedFrame { peer: peer.to_owned(), frame: other.name() }),
    }
}

fn open(talk: Talk, version: u16, pages: Option<PageDecoder>, options: &LinkOptions) -> Session {
    let Talk { connection, mut encoder, mut decoder } = talk;
    encoder.set_version(version);
    decoder.set_version(version);
    Session::start(connection, encoder, decoder, pages, options)
}

/// A peer that has said `HELLO` and waits for our answer.
pub struct Incoming {
    talk: Talk,
    /// What it said.
    pub hello: Hello,
    /// The session that it opened.
    pub key: SessionKey,
    version: u16,
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming").field("hello", &self.hello).field("key", &self.key).finish_non_exhaustive()
    }
}

impl Incoming {
    /// Reads a peer's `HELLO`. A peer without a common version is refused here.
    ///
    /// # Errors
    /// [`LinkError`] if the stream ends, is not ours, stays silent for `patience`, or has no common version.
    pub async fn accept(connection: Connection, patience: Duration) -> Result<Self, LinkError> {
        // Only a name for messages: it has not said who it is yet.
        let peer = || "the connecting peer".to_owned();
        let handshake = |reason| LinkError::Handshake { peer: peer(), reason };
        // The encoder's key is not known before HELLO; nothing is sent before.
        let placeholder =
            SessionKey { generation: crate::ids::Generation(0), nonce: crate::ids::Nonce(uuid::Uuid::nil()) };
        let mut talk = Talk { connection, encoder: Encoder::new(placeholder), decoder: Decoder::accepting() };
        let frame = tokio::time::timeout(patience, talk.receive())
            .await
            .map_err(|_| LinkError::HandshakeTimeout { peer: peer(), after: patience, said: String::new() })?
            .map_err(handshake)?;
        let (Frame::Hello(hello), Some(key)) = (frame, talk.decoder.key()) else {
            return Err(handshake(CloseReason::Protocol(FrameError::NotHello("another frame"))));
        };
        talk.encoder = Encoder::new(key);
        let ours = VersionRange::OURS;
        let Some(version) = ours.common(hello.versions) else {
            let text = format!(
                "{} speaks protocol versions {}..{}, this host {}..{}: install the same remusd on both hosts",
                hello.host, hello.versions.min, hello.versions.max, ours.min, ours.max
            );
            let error = LinkError::NoCommonVersion {
                peer: hello.host.clone(),
                theirs_min: hello.versions.min,
                theirs_max: hello.versions.max,
                ours_min: ours.min,
                ours_max: ours.max,
            };
            let code = RefuseCode::Version;
            talk.send(&Frame::Refuse { code, text }).await.map_err(handshake)?;
            return Err(error);
        };
        Ok(Self { talk, hello, key, version })
    }

    fn failed(&self) -> impl Fn(CloseReason) -> LinkError + use<> {
        let peer = self.hello.host.clone();
        move |reason| LinkError::Handshake { peer: peer.clone(), reason }
    }

    /// Declines with a sentence that says what to do.
    ///
    /// # Errors
    /// [`LinkError::Handshake`] if the answer cannot be sent.
    pub async fn refuse(mut self, code: RefuseCode, text: String) -> Result<(), LinkError> {
        let failed = self.failed();
        self.talk.send(&Frame::Refuse { code, text }).await.map_err(failed)
    }

    /// Asks the peer for a sign of life.
    ///
    /// # Errors
    /// [`LinkError::Handshake`] if the question cannot be sent.
    pub async fn challenge(&mut self, nonce: Nonce) -> Result<(), LinkError> {
        let failed = self.failed();
        self.talk.send(&Frame::Challenge { nonce }).await.map_err(failed)
    }

    /// Waits for the answer to a challenge until then; `None` is none.
    ///
    /// # Errors
    /// [`LinkError::Handshake`] if the stream ends, [`LinkError::UnexpectedFrame`] if the peer says something else.
    pub async fn challenge_answer(&mut self, until: Instant) -> Result<Option<Nonce>, LinkError> {
        let failed = self.failed();
        match tokio::time::timeout_at(until, self.talk.receive()).await {
            Err(_) => Ok(None),
            Ok(Ok(Frame::ChallengeAnswer { nonce })) => Ok(Some(nonce)),
            Ok(Ok(other)) => Err(LinkError::UnexpectedFrame { peer: self.hello.host.clone(), frame: other.name() }),
            Ok(Err(reason)) => Err(failed(reason)),
        }
    }

    /// Answers a query.
    ///
    /// # Errors
    /// [`LinkError::Handshake`] if the answer cannot be sent.
    pub async fn answer(mut self, entries: Vec<QueryEntry>) -> Result<(), LinkError> {
        let failed = self.failed();
        self.talk.send(&Frame::QueryResult(entries)).await.map_err(failed)
    }

    /// Tells a primary that its domain's copy has been activated here.
    ///
    /// # Errors
    /// [`LinkError::Handshake`] if the answer cannot be sent.
    pub async fn supersede(mut self, text: String) -> Result<(), LinkError> {
        let failed = self.failed();
        self.talk.send(&Frame::Superseded { text }).await.map_err(failed)
    }

    /// Accepts; the session is open. `host_id` and `knows_record` are those of [`Welcome`].
    ///
    /// # Errors
    /// [`LinkError::Handshake`] if the answer cannot be sent.
    pub async fn welcome(
        mut self,
        host_id: uuid::Uuid,
        knows_record: bool,
        options: &LinkOptions,
    ) -> Result<Session, LinkError> {
        let failed = self.failed();
        let capabilities = self.hello.capabilities & capability::OURS;
        let pages = match &self.hello.purpose {
            Purpose::Protect(offer) if capabilities & capability::PAGE_CODEC != 0 => {
                Some(PageDecoder::new(page_cache(offer.max_memory_kib)))
            }
            _ => None,
        };
        let welcome = Frame::Welcome(Welcome {
            version: self.version,
            capabilities,
            software: software(),
            host: host_name(),
            wall_clock_ms: super::session::wall_clock_ms(),
            host_id,
            knows_record,
        });
        self.talk.send(&welcome).await.map_err(failed)?;
        Ok(open(self.talk, self.version, pages, options))
    }
}
