//! Newer sessions of a protection whose copy is here.

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::backup::admission::CHALLENGES;
use crate::link::codec::{Decoder, Encoder};
use crate::link::{Frame, Hello, VersionRange};

/// A peer whose frames are made by hand.
struct Peer {
    stream: DuplexStream,
    encoder: Encoder,
    decoder: Decoder,
    served: tokio::task::JoinHandle<Result<(), LinkError>>,
}

impl Peer {
    /// What has been on its way for a while: a `HELLO` of this generation.
    async fn hello(backup: &Backup, generation: u64) -> Self {
        let (stream, theirs) = duplex(1 << 16);
        let registry = Arc::clone(&backup.registry);
        let served = tokio::spawn(async move { registry.serve(Connection::new(theirs)).await });
        let key = key(generation);
        let mut peer = Self { stream, encoder: Encoder::new(key), decoder: Decoder::new(key), served };
        peer.say(&Frame::Hello(Hello {
            versions: VersionRange::OURS,
            capabilities: 0,
            software: String::new(),
            host: "a".into(),
            purpose: Purpose::Protect(offer()),
        }))
        .await;
        peer
    }

    async fn say(&mut self, frame: &Frame) {
        let mut bytes = bytes::BytesMut::new();
        self.encoder.encode(frame, &mut bytes).unwrap();
        self.stream.write_all(&bytes).await.unwrap();
    }

    async fn hears(&mut self) -> Frame {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return frame;
            }
            let read = tokio::time::timeout(Duration::from_secs(10), self.stream.read_buf(self.decoder.buffer()));
            assert_ne!(read.await.expect("silence").unwrap(), 0, "the end");
        }
    }

    async fn challenged(&mut self) -> Nonce {
        match self.hears().await {
            Frame::Challenge { nonce } => nonce,
            other => panic!("{other:?}"),
        }
    }
}

/// A copy that has lost its primary, and what it has to be when it runs.
async fn waiting() -> (Backup, BTreeMap<u64, u8>) {
    let backup = Backup::new();
    let primary = Primary::armed(&backup).await;
    let memory = primary.memory.clone();
    drop(primary);
    backup.reaches(State::Waiting).await;
    (backup, memory)
}

async fn can_take_over(backup: &Backup, memory: &BTreeMap<u64, u8>) {
    assert_eq!(backup.handle().status().state, State::Waiting);
    backup.handle().failover(true).await.unwrap();
    assert_eq!(backup.host.running(NAME).unwrap().0, *memory);
}

/// The schedule that the simulator found (rule R9): the request was held up by a cut, its sender is dead when it arrives.
#[tokio::test]
async fn a_request_that_outlived_its_sender_destroys_nothing() {
    let (backup, memory) = waiting().await;
    let mut dead = Peer::hello(&backup, 2).await;
    let mut nonces = Vec::new();
    for _ in 0..CHALLENGES {
        nonces.push(dead.challenged().await);
        assert_eq!(backup.handle().status().state, State::Waiting);
    }
    match dead.hears().await {
        Frame::Refuse { code: RefuseCode::InUse, text } => assert!(text.contains("may be the only one"), "{text}"),
        other => panic!("{other:?}"),
    }
    nonces.dedup();
    assert_eq!(nonces.len() as u32, CHALLENGES, "each challenge is fresh");
    can_take_over(&backup, &memory).await;
}

/// So is one whose connection nobody knows any more: the host has booted again.
#[tokio::test]
async fn a_request_whose_connection_is_gone_destroys_nothing() {
    let (backup, memory) = waiting().await;
    let mut gone = Peer::hello(&backup, 2).await;
    gone.challenged().await;
    drop(gone.stream);
    let served = gone.served.await.unwrap();
    assert!(matches!(served, Err(LinkError::Handshake { .. })), "{served:?}");
    can_take_over(&backup, &memory).await;
}

#[tokio::test]
async fn an_answer_to_something_else_is_no_sign_of_life() {
    let (backup, memory) = waiting().await;
    let mut liar = Peer::hello(&backup, 2).await;
    liar.challenged().await;
    liar.say(&Frame::ChallengeAnswer { nonce: Nonce::random() }).await;
    // Asked again, not believed.
    liar.challenged().await;
    liar.say(&Frame::Stopped).await;
    assert!(matches!(liar.served.await.unwrap(), Err(LinkError::UnexpectedFrame { .. })));
    can_take_over(&backup, &memory).await;
}

#[tokio::test]
async fn a_primary_that_lives_begins_anew() {
    let (backup, _) = waiting().await;
    let mut peer = Peer::hello(&backup, 2).await;
    let nonce = peer.challenged().await;
    assert_eq!(backup.handle().status().state, State::Waiting, "nothing is destroyed before the answer");
    peer.say(&Frame::ChallengeAnswer { nonce }).await;
    assert!(matches!(peer.hears().await, Frame::Welcome(_)));
    peer.served.await.unwrap().unwrap();
    let status = backup.handle().status();
    assert_eq!((status.state, status.key.generation), (State::Syncing, Generation(2)));
    assert!(backup.host.names().is_empty(), "the older copy is gone");
}

/// What cannot be activated is nobody's only copy.
#[tokio::test]
async fn a_copy_that_is_not_complete_goes_without_a_question() {
    let backup = Backup::new();
    let _older = Primary::begin(&backup).await;
    let mut peer = Peer::hello(&backup, 2).await;
    assert!(matches!(peer.hears().await, Frame::Welcome(_)));
}
